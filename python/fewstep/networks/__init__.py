"""Generators, velocities, denoisers, discriminators and encoders, from small to real size."""

from fewstep.networks.body import ImageBody, in_batches
from fewstep.networks.conv import ImageConvNet
from fewstep.networks.discriminators import ConvDiscriminator, MLPDiscriminator
from fewstep.networks.encoder import (
    ImageEncoder,
    MaskedAutoencoder,
    masked_error,
    patch_masks,
)
from fewstep.networks.image import (
    ImageAverageField,
    ImageField,
    ImageGenerator,
    average_velocity,
    check_network,
    generator,
    generator_noise,
    image_body,
    velocity,
)
from fewstep.networks.mlp import AverageVelocityMLP, MLPGenerator, ResidualMLP, VelocityMLP
from fewstep.networks.preconditioning import EDMPrecond, LinePrecond
from fewstep.networks.transformer import ImageTransformer

__all__ = [
    "AverageVelocityMLP",
    "ConvDiscriminator",
    "EDMPrecond",
    "ImageAverageField",
    "ImageBody",
    "ImageConvNet",
    "ImageEncoder",
    "ImageField",
    "ImageGenerator",
    "ImageTransformer",
    "LinePrecond",
    "MLPDiscriminator",
    "MLPGenerator",
    "MaskedAutoencoder",
    "ResidualMLP",
    "VelocityMLP",
    "average_velocity",
    "check_network",
    "generator",
    "generator_noise",
    "image_body",
    "in_batches",
    "masked_error",
    "patch_masks",
    "velocity",
]
