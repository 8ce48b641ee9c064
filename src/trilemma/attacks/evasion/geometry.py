"""The ball that an attack moves in: projection, random starts and steepest steps.

All results lie in [0, 1] and, up to float rounding (a relative 1e-6), within the radius. A radius of 0 gives the
clean images bit for bit.
"""

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget, Norm


def project(x_adv_BCHW: Tensor, x_BCHW: Tensor, budget: Budget) -> Tensor:
    """Returns the perturbed images moved into the ball around the clean ones and into [0, 1].

    For L-infinity this is the nearest such image. For L2 the perturbation is shortened and then cut off at [0, 1],
    which keeps it within the radius because the clean image lies in [0, 1].

    Args:
        x_adv_BCHW: Perturbed images; finite.
        x_BCHW: Clean images in [0, 1].
        budget: The ball.
    """
    if budget.norm == "linf":
        return torch.clamp(x_adv_BCHW, x_BCHW - budget.radius, x_BCHW + budget.radius).clamp_(0.0, 1.0)
    delta_BCHW = x_adv_BCHW - x_BCHW
    length_B111 = _length(delta_BCHW)
    # A perturbation of length 0 stays as it is; the smallest float keeps the division defined.
    factor_B111 = (budget.radius / length_B111.clamp(min=torch.finfo(length_B111.dtype).tiny)).clamp(max=1.0)
    return (x_BCHW + delta_BCHW * factor_B111).clamp_(0.0, 1.0)


def random_start(x_BCHW: Tensor, budget: Budget, generator: torch.Generator) -> Tensor:
    """Returns images drawn uniformly from the ball around the clean ones, then cut off at [0, 1].

    Args:
        x_BCHW: Clean images in [0, 1].
        budget: The ball.
        generator: Source of the draws; may live on another device than the images.
    """
    if budget.norm == "linf":
        noise_BCHW = _uniform(x_BCHW.shape, generator).to(x_BCHW) * 2.0 - 1.0
        return project(x_BCHW + budget.radius * noise_BCHW, x_BCHW, budget)
    direction_BCHW = torch.randn(x_BCHW.shape, generator=generator, device=generator.device).to(x_BCHW)
    # The share of a ball's volume within a fraction f of its radius is f ** dimensions.
    fraction_B111 = _uniform((len(x_BCHW), 1, 1, 1), generator).to(x_BCHW) ** (1.0 / max(1, x_BCHW[0:1].numel()))
    return project(x_BCHW + steepest_step(direction_BCHW, budget.radius, "l2") * fraction_B111, x_BCHW, budget)


def steepest_step(gradient_BCHW: Tensor, step_size: float, norm: Norm) -> Tensor:
    """Returns the step of length `step_size` in a norm along which the loss grows fastest to first order.

    For L-infinity the sign of the gradient, for L2 its direction. A gradient of zero gives no step, and so do
    entries that are not a number, so that a broken model cannot push an image out of the numbers.

    Args:
        gradient_BCHW: Gradient of the loss.
        step_size: Length of the step, in pixel units.
        norm: The norm in which the length is measured.
    """
    gradient_BCHW = gradient_BCHW.nan_to_num(nan=0.0)
    if norm == "linf":
        return step_size * gradient_BCHW.sign()
    # Scaled to a largest entry of 1 first: the squares of a vanishing gradient underflow.
    largest_B111 = gradient_BCHW.abs().amax(dim=(1, 2, 3), keepdim=True)
    scaled_BCHW = torch.where(largest_B111 > 0, gradient_BCHW / largest_B111, 0.0)
    return step_size * scaled_BCHW / _length(scaled_BCHW).clamp(min=1.0)


def of_mean_1(gradient_BCHW: Tensor) -> Tensor:
    """Returns gradients divided by their mean absolute entry; where there is none, 0."""
    gradient_BCHW = gradient_BCHW.nan_to_num(nan=0.0)
    # Scaled to a largest entry of 1 first: a vanishing gradient has a mean that underflows.
    largest_B111 = gradient_BCHW.abs().amax(dim=(1, 2, 3), keepdim=True)
    scaled_BCHW = torch.where(largest_B111 > 0, gradient_BCHW / largest_B111, 0.0)
    mean_B111 = scaled_BCHW.abs().mean(dim=(1, 2, 3), keepdim=True)
    return torch.where(largest_B111 > 0, scaled_BCHW / mean_B111, 0.0)


def _length(delta_BCHW: Tensor) -> Tensor:
    return torch.linalg.vector_norm(delta_BCHW, dim=(1, 2, 3), keepdim=True)


def _uniform(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)
