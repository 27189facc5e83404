"""Train an embedder: ``python train.py fit --config configs/...yaml``; see ``python train.py fit --help``."""

from ullme.commands.train import main

if __name__ == "__main__":
    main()
