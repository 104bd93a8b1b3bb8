"""Forward and backward messages of a chain by hand, in four forms; each gives exactly the same probabilities.

In: start `(k,)`, transitions `(k, k)` and likelihoods `b`, time first, states next; a last axis holds chains side by
side, or blocks of one chain. Out: `Messages`, from which every marginal and the log-likelihood follow (`counts`).

All forms rest on one recursion, `along`: probabilities, scaled at every step, one small product a step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_UNROLL = 16  # states up to which a product is written out, so that it fuses with what surrounds it


class Messages(NamedTuple):
    """What arrives at every step, from the steps before and from those after.

    Attributes:
        arrived: probability of the states given what was seen before each step, shaped as `b`.
        norms: probability of what is seen at each step given what was seen before; no state axis.
        back: likelihood of all later steps given the states of each step, up to a factor.
        ahead: the same as `b * back` for the step after the last, with the sum of `arrived` times it one.
    """

    arrived: Any
    norms: Any
    back: Any
    ahead: Any


def product(x, trans):
    """Sum of `x[..., j, n] * trans[j, m]` over `j`: a message, or many side by side, through the transitions."""
    import jax.numpy as jnp

    if x.ndim == 1:
        return x @ trans
    if len(trans) <= _UNROLL:
        return sum(x[..., j, None, :] * trans[j][:, None] for j in range(len(trans)))
    return jnp.einsum("...jn,jm->...mn", x, trans)


def along(trans, first, b):
    """Messages as they arrive at every step, the first given, and their norms.

    The scaled message is carried and the product made at once: carrying what arrives takes five times as long.
    """
    import jax.numpy as jnp
    from jax import lax

    def step(filtered, b):
        arrived = product(filtered, trans)
        weight = arrived * b
        norm = weight.sum(0)
        return weight / norm, (arrived, norm)

    weight = first * b[0]
    norm = weight.sum(0)
    _, (arrived, norms) = lax.scan(step, weight / norm, b[1:])
    return jnp.concatenate([first[None], arrived]), jnp.concatenate([norm[None], norms])


def plain(start, trans, b) -> Messages:
    """One scan forward, one backward."""
    import jax.numpy as jnp

    first = start if b.ndim == 2 else jnp.broadcast_to(start[:, None], b.shape[1:])
    arrived, norms = along(trans, first, b)
    back, _ = along(trans.T, jnp.ones_like(b[0]), b[::-1])
    return Messages(arrived, norms, back[::-1], jnp.zeros_like(b[0]))


def both_ways(trans, first, last, b):
    """`along`, forward and backward in one scan, for chains side by side."""
    import jax.numpy as jnp
    from jax import lax

    def step(carry, at):
        (filtered, behind), (b, b_back) = carry, at
        arrived, back = product(filtered, trans), product(behind, trans.T)
        weight, new = arrived * b, back * b_back
        norm = weight.sum(0)
        return (weight / norm, new / new.sum(0)), (arrived, norm, back)

    weight, behind = first * b[0], last * b[-1]
    norm = weight.sum(0)
    _, (arrived, norms, back) = lax.scan(step, (weight / norm, behind / behind.sum(0)), (b[1:], b[-2::-1]))
    arrived, norms = jnp.concatenate([first[None], arrived]), jnp.concatenate([norm[None], norms])
    return arrived, norms, jnp.concatenate([back[::-1], last[None]])


def side_by_side(start, trans, b) -> Messages:
    """Many chains at once, both ways in one scan."""
    import jax.numpy as jnp

    first = jnp.broadcast_to(start[:, None], b.shape[1:])
    return Messages(*both_ways(trans, first, jnp.ones_like(first), b), jnp.zeros_like(first))


def two_way(start, trans, b) -> Messages:
    """One chain over two devices, half of its time on each: one runs forward while the other runs backward.

    To be called inside `shard_map` over the axis "d"; `b` is this device's half.
    """
    import jax.numpy as jnp
    from jax import lax

    device, half = lax.axis_index("d"), len(b)
    whole = lax.all_gather(b, "d", tiled=True)
    first = jnp.where(device == 0, start, jnp.ones_like(start))
    way = jnp.where(device == 0, whole, whole[::-1])
    # the same program on both, for a branch would be taken by each device in turn
    messages, norms = along(jnp.where(device == 0, trans, trans.T), first, way)
    arrived, back = lax.all_gather(messages, "d")
    back, norms = back[::-1], lax.all_gather(norms, "d")[0]
    ahead = whole[half] * back[half]

    def own(x):
        return lax.dynamic_slice_in_dim(x, device * half, half)

    return Messages(own(arrived), own(norms), own(back), ahead / (arrived[half] * ahead).sum())


def blocked(start, trans, b) -> Messages:
    """One chain cut into blocks, which lie side by side: `b` is (steps of a block, states, blocks).

    First every block's product of `diag(b) trans`, all blocks at once; then messages from block to block; then the
    messages inside, all blocks at once. To be called inside `shard_map` over the axis "d", the blocks in order.
    """
    import jax.numpy as jnp
    from jax import lax

    k, here = b.shape[1:]

    def through(transfer, b):
        transfer = product(transfer * b, trans)
        return transfer / transfer.max((0, 1)), None

    eye = jnp.broadcast_to(jnp.eye(k, dtype=b.dtype)[:, :, None], (k, k, here))
    transfer, _ = lax.scan(through, eye, b)
    every = lax.all_gather(transfer.transpose(2, 0, 1), "d", tiled=True)

    def over(carry, at):
        (arrived, after), (forth, back) = carry, at
        new = arrived @ forth, back @ after
        return (new[0] / new[0].sum(), new[1] / new[1].sum()), (arrived, after)

    # the rows of the transitions sum to one: so does what follows the end, `trans @ 1`
    arrived, after = lax.scan(over, (start, jnp.ones_like(start)), (every, every[::-1]))[1]
    begin = lax.axis_index("d") * here
    arrived = lax.dynamic_slice_in_dim(arrived, begin, here).T
    after = lax.dynamic_slice_in_dim(after[::-1], begin, here).T
    arrived, norms, back = both_ways(trans, arrived, product(after, trans.T), b)
    next_arrived = product(arrived[-1] * b[-1] / norms[-1], trans)
    return Messages(arrived, norms, back, after / (next_arrived * after).sum(0))


def associative(start, trans, b) -> Messages:
    """One chain by prefix and suffix products of `diag(b) trans`, as `lax.associative_scan` orders them."""
    import jax.numpy as jnp
    from jax import lax

    def combine(x, y):
        z = x @ y
        return z / z.max((-2, -1), keepdims=True)

    steps = b[:, :, None] * trans
    arrived = start @ lax.associative_scan(combine, steps)[:-1]
    arrived = jnp.concatenate([start[None], arrived / arrived.sum(1, keepdims=True)])
    after = lax.associative_scan(lambda x, y: combine(y, x), steps[1:], reverse=True).sum(2)
    back = jnp.concatenate([after @ trans.T, jnp.ones_like(b[:1])])
    return Messages(arrived, (arrived * b).sum(1), back, jnp.zeros_like(start))


def counts(trans, b, messages: Messages, follows):
    """Posterior of every step, expected pairs of neighbours (one product), and the log-likelihood of `b`.

    `follows` is one at the steps that another one follows: by axes, time and what lies side by side.
    """
    import jax.numpy as jnp

    arrived, norms, back, ahead = messages
    later = b * back
    later = later / (arrived * later).sum(1, keepdims=True)
    filtered = arrived * b / norms[:, None]
    following = jnp.concatenate([later[1:], ahead[None]]) * follows[:, None]
    pairs = trans * jnp.einsum("ti...,tj...->ij", filtered, following)
    return arrived * later, pairs, jnp.log(norms).sum()
