"""The project file, deploy.toml: the user's model factory, weights, data and metric."""

from pipeline.project.batches import Batches, TrainBatches
from pipeline.project.project import Predict, Project, TrainData, load_project, predict_torch

__all__ = ["Batches", "Predict", "Project", "TrainBatches", "TrainData", "load_project", "predict_torch"]
