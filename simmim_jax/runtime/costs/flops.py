"""FLOPs of a training step: multiplications and additions in its matmuls, counted in the traced program.

XLA's own count (`Compiled.cost_analysis`) is no substitute: it counts the body of a scan once, and counts operations
that rematerialization repeats.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.interpreters import partial_eval
from jaxtyping import PyTree


def step_flops(loss_fn: Callable, params: PyTree, batch: PyTree, key) -> int:
    """FLOPs of the matmuls of a loss and its gradient for a global batch, as MFU counts them.

    Each matmul of the forward pass counts once, and once more for each operand that depends on a trained parameter
    (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Frozen parameters and images need no backward pass.
    Rematerialized operations count once. Norms, softmax, GELU and the optimizer count nothing.

    A scan counts times its length, a shard_map times its devices, a cond as its most expensive branch, and a while loop
    once. cuDNN attention counts as its two matmuls.

    loss_fn: (params, batch, key, train) -> (loss, metrics); arguments may be abstract.
    """
    closed = jax.make_jaxpr(lambda *x: loss_fn(*x, True)[0])(params, batch, key)
    jaxpr, _ = partial_eval.dce_jaxpr(_open(closed), [True], instantiate=True)
    learned = len(jax.tree.leaves(params))
    forward, backward, _ = _count(jaxpr, [n < learned for n in range(len(jaxpr.invars))])
    return forward + backward


def _open(jaxpr) -> Jaxpr:
    return getattr(jaxpr, "jaxpr", jaxpr)  # of a ClosedJaxpr, which later versions of JAX do not have


def _count(jaxpr: Jaxpr, active: Sequence[bool]) -> tuple[int, int, list[bool]]:
    """(forward FLOPs, backward FLOPs, for each result whether it depends differentiably on an active argument)."""
    forward, backward = 0, 0
    reached = {variable for variable, is_active in zip(jaxpr.invars, active, strict=True) if is_active}
    is_reached = lambda x: not isinstance(x, Literal) and x in reached  # noqa: E731
    for equation in jaxpr.eqns:
        inputs = [is_reached(x) for x in equation.invars]
        own_forward, own_backward, outputs = _count_equation(equation, inputs)
        forward, backward = forward + own_forward, backward + own_backward
        pairs = zip(equation.outvars, outputs, strict=True)
        reached.update(x for x, y in pairs if y and jnp.issubdtype(x.aval.dtype, jnp.inexact))
    return forward, backward, [is_reached(x) for x in jaxpr.outvars]


def _count_equation(equation: JaxprEqn, active: list[bool]) -> tuple[int, int, list[bool]]:
    name, params, everything = equation.primitive.name, equation.params, [any(active)] * len(equation.outvars)
    if name == "stop_gradient":
        return 0, 0, [False]
    if name == "dot_general":
        shape, contracted = equation.invars[1].aval.shape, params["dimension_numbers"][0][1]
        flops = 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        return flops, flops * sum(active), everything
    if name == "conv_general_dilated":
        shape, outputs = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        flops = 2 * equation.outvars[0].aval.size * math.prod(shape) // shape[outputs]
        return flops, flops * sum(active), everything
    if name.startswith("dot_product_attention_fwd"):  # cuDNN, inside jax.nn.dot_product_attention
        keys = equation.invars[1].aval.shape[2 if params["layout"] == 1 else 1]  # layout 1: b h n d, 0: b n h d
        logits, values = [2 * equation.outvars[0].aval.size * keys] * 2
        reach_logits = any(active[:2]) or any(active[3:])
        return logits + values, logits * sum(active[:2]) + values * (reach_logits + active[2]), everything
    if name == "scan":
        return _count_scan(equation, active)
    if name == "while":
        return _count_while(params, active)
    if name == "cond":
        branches = [_count(_open(branch), active[1:]) for branch in params["branches"]]
        forward, backward, _ = max(branches, key=lambda x: x[0] + x[1])
        return forward, backward, [any(x) for x in zip(*(outputs for *_, outputs in branches), strict=True)]
    times = math.prod(params["mesh"].shape.values()) if name == "shard_map" else 1
    inner = [_open(x) for x in jaxprs_in_params(params)]
    if len(inner) == 1 and len(inner[0].invars) == len(active):  # jit, remat, custom_jvp, custom_vjp, shard_map
        forward, backward, outputs = _count(inner[0], active)
        return times * forward, times * backward, outputs
    counts = [_count(x, [any(active)] * len(x.invars)) for x in inner]  # functions of a reduction or a sort
    return sum(x[0] for x in counts), sum(x[1] for x in counts), everything


def _count_scan(equation: JaxprEqn, active: list[bool]) -> tuple[int, int, list[bool]]:
    body, length = _open(equation.params["jaxpr"]), equation.params["length"]
    # Arguments are constants, carries and slices; results are carries and slices. A slice lacks the first axis.
    whole = lambda outer, inner: len(outer.aval.shape) == len(inner.aval.shape)  # noqa: E731
    carries = sum(map(whole, equation.outvars, body.outvars))
    first = sum(map(whole, equation.invars, body.invars)) - carries
    forward, backward, outputs = _count_loop(body, active, first, carries)
    return length * forward, length * backward, outputs


def _count_while(params: dict, active: list[bool]) -> tuple[int, int, list[bool]]:
    condition, first = params["cond_nconsts"], params["body_nconsts"]
    body, inputs = _open(params["body_jaxpr"]), active[condition:]
    return _count_loop(body, inputs, first, len(inputs) - first)


def _count_loop(body: Jaxpr, active: list[bool], first: int, carries: int) -> tuple[int, int, list[bool]]:
    """`_count` of a loop body; a carry is active if any iteration makes it so."""
    while True:
        forward, backward, outputs = _count(body, active)
        carried = [a or b for a, b in zip(active[first : first + carries], outputs, strict=False)]
        if carried == active[first : first + carries]:
            return forward, backward, outputs
        active = [*active[:first], *carried, *active[first + carries :]]
