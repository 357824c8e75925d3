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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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


def loss_hessian(
    model: GPT,
    inputs: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    *,
    micro_batch: int | None = None,
    check: Callable[[], object] = lambda: None,
) -> Product:
    """The function v -> H v for the Hessian H of the training loss, in evaluation mode.

    In the weights' precision. Weights, gradients and random generators stay as they are.

    Args:
        model: not compiled.
        inputs, targets: (B, T) integers, on the model's device.
        z_loss: weight of the z-loss in the training loss.
        micro_batch: sequences whose graph is in memory at a time; all by default.
        check: called in each product; an exception that it raises ends the computation.
    """
    parameters, size = list(model.parameters()), micro_batch or len(inputs)
    parts = list(zip(inputs.split(size), targets.split(size), strict=True))

    def of_part(x: Tensor, y: Tensor) -> Product:
        with _twice_differentiable(model):
            return hessian_product(model.loss_fn(x, y, z_loss)[0], parameters)

    # A single graph serves all products; several graphs are rebuilt for each product.
    get_product = functools.cache(of_part) if len(parts) == 1 else of_part

    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for x, y in parts:
            check()
            total.add_(get_product(x, y)(v), alpha=len(x) / len(inputs))
        return total

    return product


def sharpness(model: GPT, product: Product) -> float:
    """The largest eigenvalue of a Hessian, given by its product; NaN if it was not found."""
    start = torch.randn(model.num_parameters(), generator=generator("curvature"))
    return largest_eigenvalue(product, start.to(next(model.parameters())))


def adam_preconditioner(
    model: GPT, optimizer: Optimizer, second_moments: Mapping[str, Tensor], updates: int
) -> Tensor:
    """The diagonal of AdamW's P in the next update, (sqrt(v) + ε)/f: (n,).

    v is that of the update itself: it includes the gradients in the model, clipped. Cohen et al.'s
    code (init2winit) reads v from the optimizer's state, without them. With full batches that v
    hardly differs, but where a gradient is seldom nonzero, as for a rare token's embedding, it
    is far too small whenever the token occurs. f is the parameter's factor on the learning rate.
    The bias correction of the first moment is in `stability_threshold`.

    Args:
        model: with the gradients of the update, not yet clipped.
        optimizer: AdamW, before the update.
        second_moments, updates: of the optimizer, from its `second_moments`.
    """
    config, factors = optimizer.config, optimizer.by_parameter("lr_factor")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values())
    clip = math.inf if config.clip is None else config.clip
    clipping = (clip / (norm + 1e-6)).clamp(max=1)  # as in torch's clip_grads_with_norm_
    # v before the update is bias-corrected, as is v after it, so the weights of both change.
    weight = (1 - config.beta2) / (1 - config.beta2 ** (updates + 1))
    diagonal = []
    for name, gradient in gradients.items():
        square = (clipping * gradient).square()
        v = torch.lerp(second_moments.get(name, square), square, weight)
        diagonal.append((v.sqrt() + config.eps) / factors[name])
    return _flat(diagonal)


def measure_sharpness(
    model: GPT,
    product: Product,
    optimizer: Optimizer,
    second_moments: Mapping[str, Tensor],
    updates: int,
) -> dict[str, float]:
    """`sharpness`, and with AdamW `preconditioned_sharpness`; see `adam_preconditioner`.

    Args:
        product: of the Hessian, from `loss_hessian`.
        second_moments, updates: of the optimizer, from its `second_moments`.
    """
    measured = {"sharpness": sharpness(model, product)}
    if optimizer.config.name == "adamw":
        diagonal = adam_preconditioner(model, optimizer, second_moments, updates)
        of_adam = sharpness(model, preconditioned(product, diagonal))
        measured["preconditioned_sharpness"] = of_adam
    return measured


def stability_threshold(
    config: OptimizerConfig, learning_rate: float, updates: int
) -> dict[str, float]:
    """The value above which training on a quadratic loss diverges, without decay and clipping.

    `sharpness_threshold` of SGD with Nesterov momentum μ is (2 + 2 μ)/((1 + 2 μ) η) (Cohen et al.
    2021). `preconditioned_threshold` of AdamW with P held fixed is (2 + 2 β1)/((1 - β1) η) (Cohen
    et al. 2022), times 1 - β1^t because the bias correction of the first moment divides by it.
    Other optimizers have none: RAdam's first updates are SGD's, and it rescales η in later ones.

    Args:
        updates: t, the number of updates with this one.
    """
    inverse = 1 / learning_rate if learning_rate else math.inf
    if config.name == "sgd":
        mu = config.momentum
        return {"sharpness_threshold": (2 + 2 * mu) / (1 + 2 * mu) * inverse}
    if config.name == "adamw":
        beta1 = config.beta1
        correction = 1 - beta1**updates
        threshold = correction * (2 + 2 * beta1) / (1 - beta1) * inverse
        return {"preconditioned_threshold": threshold}
    return {}


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
