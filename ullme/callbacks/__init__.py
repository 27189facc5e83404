"""Lightning callbacks: the losses that may stand under ``loss:``, and what watches a run."""

from ullme.callbacks.base import LossCallback
from ullme.callbacks.checkpoint import Checkpoint
from ullme.callbacks.full_batch import FullBatch
from ullme.callbacks.gradcache import GradCache
from ullme.callbacks.grl import GRL
from ullme.callbacks.similarity_map import SimilarityMap
from ullme.callbacks.throughput import Throughput

__all__ = ["GRL", "Checkpoint", "FullBatch", "GradCache", "LossCallback", "SimilarityMap", "Throughput"]
