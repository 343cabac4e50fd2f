"""The frameworks: each is one file that reads like its algorithm."""

from .baselines import Centralized, Local
from .fedllm import FedLLM
from .kd import KD
from .split import Split

FRAMEWORKS = ("fedllm", "kd", "split", "centralized", "local")

__all__ = ["FRAMEWORKS", "KD", "Centralized", "FedLLM", "Local", "Split"]
