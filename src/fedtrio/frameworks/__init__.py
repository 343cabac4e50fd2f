"""The frameworks: each is one file that reads like its algorithm."""

from .baselines import Centralized, Local
from .fedllm import FedLLM
from .kd import KD
from .kd_feddf import FedDF
from .kd_fedmd import FedMD
from .kd_fedmkt import FedMKT
from .lab import Framework
from .split import Split

FRAMEWORKS = ("fedllm", "kd", "split", "centralized", "local")
ADDED: dict[str, Framework] = {}  # by users, see `fedtrio.extend`
PROTOCOLS: dict[str, type[KD]] = {"standard": KD, "dsfl": KD, "fedmd": FedMD, "feddf": FedDF, "fedmkt": FedMKT}

__all__ = [
    "ADDED",
    "FRAMEWORKS",
    "KD",
    "PROTOCOLS",
    "Centralized",
    "FedDF",
    "FedLLM",
    "FedMD",
    "FedMKT",
    "Local",
    "Split",
]
