"""Lightning callbacks: the losses that may stand under ``loss:``, and what watches a run."""

from ullme.callbacks.base import LossCallback
from ullme.callbacks.full_batch import FullBatch
from ullme.callbacks.gradcache import GradCache
from ullme.callbacks.throughput import Throughput

__all__ = ["FullBatch", "GradCache", "LossCallback", "Throughput"]
