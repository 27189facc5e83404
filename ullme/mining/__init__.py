"""Mining of hard negatives and candidates from a corpus."""
