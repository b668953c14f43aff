"""All experiments, in the order of the paper's story."""

from nnflow.figures import cosines, dimension
from nnflow.figures.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    made.name: made
    for made in (
        cosines.EXPERIMENT,
        dimension.EXPERIMENT,
    )
}
