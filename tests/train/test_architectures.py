"""Encoders of every architecture of torchvision, and of many families of timm, as files: written, read back, and the same features.
Those of more than 50 million parameters have shapes and no values, as what could go wrong with them are the names."""
import pytest
import timm
import torch
import torchvision
from torch import nn

from clae_fastai.all import create_encoder, export_onnx, load_encoder, num_features, plain_state
