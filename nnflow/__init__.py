"""The closed-form velocity of flow matching on real image sets.

How an image becomes a velocity, module by module: `sources` and `decode` read it, `ingest` and `store` keep
it, `embedding` and `index` find it, `nearfield` and `scan` weigh it; where that is too dear, `coordinates`
and `residual` stand for it, in the `ladder` of `farfield` that `calibration` chose; `velocity` answers.
`targets`, `training`, `sampling` and `evaluation` are what the answer is for.
"""

from nnflow.calibrating import calibrate
from nnflow.calibration import Calibration
from nnflow.config import TrainConfig, resolve
from nnflow.errors import NNFlowError
from nnflow.evaluation import evaluate
from nnflow.index import NeighbourIndex
from nnflow.metrics import memorised_fraction
from nnflow.sampling import noise_of, sample
from nnflow.scan import nearest_images
from nnflow.store import ImageStore
from nnflow.targets import TARGETS, EmpiricalFlowMatcher, make_matcher
from nnflow.training import train
from nnflow.unet import LearnedVelocity
from nnflow.velocity import EmpiricalVelocity, Estimate, HybridVelocity, Velocity

__all__ = [
    "TARGETS",
    "Calibration",
    "EmpiricalFlowMatcher",
    "EmpiricalVelocity",
    "Estimate",
    "HybridVelocity",
    "ImageStore",
    "LearnedVelocity",
    "NNFlowError",
    "NeighbourIndex",
    "TrainConfig",
    "Velocity",
    "calibrate",
    "evaluate",
    "make_matcher",
    "memorised_fraction",
    "nearest_images",
    "noise_of",
    "resolve",
    "sample",
    "train",
]
