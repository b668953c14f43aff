"""All experiments, in the order of the paper's story."""

from nnflow.figures import capacity, cosines, dimension, plane, targets, tau, trajectories
from nnflow.figures.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    made.name: made
    for made in (
        plane.EXPERIMENT,
        cosines.EXPERIMENT,
        dimension.EXPERIMENT,
        capacity.EXPERIMENT,
        tau.EXPERIMENT,
        targets.EXPERIMENT,
        trajectories.EXPERIMENT,
    )
}
