"""Curvature of the training loss: sharpness, the largest eigenvalue of its Hessian H.

Gradient descent at learning rate η is unstable along an eigenvector of H whose eigenvalue exceeds
2/η, and full-batch training hovers there (Cohen et al. 2021). For Adam, the matrix is the
preconditioned Hessian P^-1/2 H P^-1/2 and the threshold (2 + 2 β1)/((1 - β1) η), 38/η for
β1 = 0.9 (Cohen et al. 2022). Warm-up lets a model reach flatter regions before η is large (Gilmer
et al. 2021).

Lanczos iterations need only products H v, of two backward passes each. So H is never formed.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gpt.config import OptimizerConfig
from gpt.model.gpt2 import GPT, CausalSelfAttention
from gpt.optim import Optimizer
from gpt.rng import generator

Product = Callable[[Tensor], Tensor]  # v -> A v for a symmetric matrix A: (n,) -> (n,)

TOLERANCE = 1e-3  # relative error of an eigenvalue
MAX_PRODUCTS = 200  # an eigenvalue that has not converged by then is unknown


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Product:
    """The function v -> H v of a scalar loss's Hessian H; v is one value per weight, flattened.

    H v is the gradient of the inner product of v and the gradient (Pearlmutter 1994).

    Args:
        loss: computed from `parameters` by operations that can be differentiated twice.
    """
    grad = functools.partial(torch.autograd.grad, materialize_grads=True)
    gradient = _flat(grad(loss, parameters, create_graph=True))

    def product(v: Tensor) -> Tensor:
        return _flat(grad(gradient, parameters, v, retain_graph=True))

    return product


def preconditioned(product: Product, preconditioner: Tensor) -> Product:
    """Products with P^-1/2 A P^-1/2, whose eigenvalues are those of P^-1 A.

    Args:
        product: with A.
        preconditioner: the diagonal of P, positive.
    """
    scale = preconditioner.rsqrt()
    return lambda v: scale * product(scale * v)


def largest_eigenvalue(
    product: Product,
    start: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_products: int = MAX_PRODUCTS,
) -> float:
    """The largest (not the largest absolute) eigenvalue of a symmetric matrix; by Lanczos (1950).

    Vectors are not reorthogonalized, so only three are kept, whatever the number of steps: rounding
    only makes copies of eigenvalues that have converged (Paige 1980).

    Args:
        start: (n,), not orthogonal to the eigenvector.
        tolerance: ends the iteration once the residual |A x - λ x| is below this fraction of |λ|.

    Returns:
        NaN if a product is not finite, or if nothing has converged after `max_products`.
    """
    previous, v = torch.zeros_like(start), start / start.norm()
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(min(max_products, len(start))):
        w = product(v)
        diagonal.append(torch.dot(v, w).item())
        w = w - diagonal[-1] * v - (off_diagonal[-1] if off_diagonal else 0.0) * previous
        beta = w.norm().item()
        if not math.isfinite(diagonal[-1] + beta):
            return math.nan
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if off_diagonal:
            beside = torch.tensor(off_diagonal, dtype=torch.float64)
            tridiagonal += beside.diag(1) + beside.diag(-1)
        eigenvalues, eigenvectors = torch.linalg.eigh(tridiagonal)
        largest = eigenvalues[-1].item()
        if beta * abs(eigenvectors[-1, -1].item()) <= tolerance * abs(largest):
            return largest
        previous, v = v, w / beta
        off_diagonal.append(beta)
    return math.nan


def sharpness(
    model: GPT,
    inputs: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    preconditioner: Tensor | None = None,
) -> float:
    """The largest eigenvalue of the Hessian of the training loss, in evaluation mode.

    Uses the weights' precision. Leaves weights, gradients and random generators as they are.

    Args:
        model: not compiled.
        inputs, targets: (B, T) integers, on the model's device.
        z_loss: weight of the z-loss in the training loss.
        preconditioner: the diagonal of P for P^-1/2 H P^-1/2, (n,).

    Returns:
        NaN if it was not found.
    """
    parameters = list(model.parameters())
    with _twice_differentiable(model):
        product = hessian_product(model.loss_fn(inputs, targets, z_loss)[0], parameters)
    start = torch.randn(model.num_parameters(), generator=generator("curvature"))
    if preconditioner is not None:
        product = preconditioned(product, preconditioner)
    return largest_eigenvalue(product, start.to(parameters[0]))


def measure_sharpness(
    model: GPT, inputs: Tensor, targets: Tensor, z_loss: float, optimizer: Optimizer
) -> dict[str, float | None]:
    """`sharpness`, and `preconditioned_sharpness`, with Adam's preconditioner.

    The latter is None if Adam does not update all parameters, or has made no update yet.

    Args:
        model, inputs, targets, z_loss: as for `sharpness`.
        optimizer: of the model.
    """
    moments, eps = optimizer.second_moments(), optimizer.adam_eps()
    names = [name for name, _ in model.named_parameters()]
    of_adam = None
    if moments.keys() >= set(names):
        # Adam's denominator, as in Cohen et al.'s code (init2winit): v corrected for its bias. The
        # correction of the first moment, which matters in the first steps, is left out.
        adam = _flat(moments[name].sqrt() + eps[name] for name in names)
        of_adam = sharpness(model, inputs, targets, z_loss, adam)
    plain = sharpness(model, inputs, targets, z_loss)
    return {"sharpness": plain, "preconditioned_sharpness": of_adam}


def stability_thresholds(config: OptimizerConfig, learning_rate: float) -> dict[str, float]:
    """The values above which training on a quadratic loss diverges, without decay and clipping.

    `sharpness_threshold` is 2/η for gradient descent, and (2 + 2 μ)/((1 + 2 μ) η) for SGD with
    Nesterov momentum μ (Cohen et al. 2021). `preconditioned_threshold` is Adam's with P held fixed,
    (2 + 2 β1)/((1 - β1) η) (Cohen et al. 2022).
    """
    mu = config.momentum if config.name == "sgd" else 0.0
    beta1 = config.beta1
    of_sgd, of_adam = (2 + 2 * mu) / (1 + 2 * mu), (2 + 2 * beta1) / (1 - beta1)
    inverse = 1 / learning_rate if learning_rate else math.inf
    return {
        "sharpness_threshold": of_sgd * inverse,
        "preconditioned_threshold": of_adam * inverse,
    }


@contextlib.contextmanager
def _twice_differentiable(model: GPT) -> Iterator[None]:
    """A context in evaluation mode, without the kernels that can be differentiated only once."""
    training, loss_chunk = model.training, model.loss_chunk
    kernels = [attention.kernel for attention in model.attentions()]
    model.eval()
    model.loss_chunk = None
    for attention in model.attentions():
        attention.kernel = _explicit(attention)
    try:
        yield
    finally:
        model.train(training)
        model.loss_chunk = loss_chunk
        for attention, kernel in zip(model.attentions(), kernels, strict=True):
            attention.kernel = kernel


def _explicit(attention: CausalSelfAttention) -> Callable[..., Tensor]:
    return lambda q, k, v, **options: attention.weights(attention.scores(q, k)) @ v


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
