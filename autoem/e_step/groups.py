"""Group continuous latents that are integrated together, and find the cells that every row of their sites reads.

In: a classified program, its factors and the data. Out: the blocks of the E-step over continuous latents, and index
arrays that stand among the data's cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autoem._errors import Intractable, PlanError
from autoem.e_step.cells.censoring import find_pieces
from autoem.e_step.cells.local import LocalBlock
from autoem.e_step.elimination.places import plates_of, scale_of
from autoem.e_step.gaussian.beside import named_index
from autoem.e_step.gaussian.block import GaussianBlock, index_name
from autoem.e_step.gaussian.chain import GaussianChain
from autoem.e_step.gaussian.crossed import CrossedBlock
from autoem.e_step.gaussian.missing import MissingEntries, patterns_of
from autoem.e_step.gaussian.nested import NestedBlock
from autoem.e_step.joined import agree, cells_of_rows, join_companions, joined_at, read_by
from autoem.e_step.tables.factors import refuse_random_weights
from autoem.e_step.tables.tabulate import Factor
from autoem.e_step.tied import LEVELS_FROM, MAX_DENSE, nested_block
from autoem.ir import Continuous, Latent, Program, at_lag
from autoem.passes.gaussian import Group, latent_groups

Block = GaussianBlock | GaussianChain | LocalBlock | MissingEntries | NestedBlock | CrossedBlock


def build_blocks(
    program: Program, factors: Sequence[Factor], values: Mapping[Any, Any]
) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
    """The blocks, and for each factor and latent the cell that every row reads.

    Raises:
        Joined: a row reads several cells of a latent, which are not one vector yet. PlanError: see `gaussian_block`.
    """
    blocks, cells = [], {}
    for group in latent_groups(program):
        if group.drawn:
            continue
        join_companions(
            program, [program.continuous[n] for n in group.members], [f for f in factors if f.name in group.sites]
        )
        derive = local_block if group.refusal else gaussian_block
        block, found = derive(program, group, {f.name: f for f in factors}, values)
        blocks.append(block)
        cells.update(found)
    return tuple(blocks), cells


def gaussian_block(
    program: Program, group: Group, factors: Mapping[str, Factor], values: Mapping[Any, Any]
) -> tuple[Block, dict[str, np.ndarray]]:
    members = tuple(program.continuous[n] for n in group.members)
    parts = tuple(factors[s] for s in group.sites if s in factors)
    refuse_unread(program, members, parts)
    refuse_scaled(program, parts)
    discrete = tuple({z.name: z for f in parts for z in f.latents}.values())
    if (chain := gaussian_chain(program, members, parts, discrete)) is not None:
        return chain, path_rows(program, chain, values)
    index = {(f.name, m.name): cells_of_rows(program, f, m, values, True) for f in parts for m in read_by(f)}
    every = {m.name for f in parts for m in read_by(f)}
    same = len({m.axes for m in members}) == 1 and all(agree(index, f) for f in parts) and every <= set(group.members)
    routed = frozenset(f.name for f in parts if not set(members[0].plates) <= set(f.site.plates))
    size = sum(m.dim * int(np.prod(m.shape, dtype=int)) for m in members)
    carried = next((program.base_of(m.name) for m in members if program.chain_of(m.name)), None)
    if carried and discrete:
        switch = discrete[0].name.partition("[")[0].partition("@")[0]
        raise Intractable(
            carried,
            latents=group.members,
            problem=f"it is carried from step to step and its sites read the discrete latent '{switch}': "
            "its posterior has a Gaussian for each combination of all steps",
            mend=f"leave e_step out, and an approximation is chosen; or observe '{switch}', "
            f"or give '{carried}' a grid of values (Categorical)",
        )
    if not same and not discrete and not carried and size >= LEVELS_FROM:
        block, found = nested_block(program, members, parts, index)
        if block is not None:
            return block, found
    if not same and (size > MAX_DENSE or discrete):
        why = f"one vector of {size:,} coordinates" if not discrete else f"a mixture over {discrete[0].name}"
        raise Intractable(
            group.members[0],
            latents=group.members,
            problem=f"{', '.join(group.members)} are read by different indices, so all their cells are tied: {why}",
            mend="nest the groups, or read them by one index",
        )
    plates = tuple(a for a in members[0].axes if not a.startswith("#")) if same else ()
    refuse_mixtures(members, plates, discrete)
    shape = tuple(s for a, s in zip(members[0].axes, members[0].shape, strict=True) if not a.startswith("#"))
    sizes = {p.name: p.size for p in program.plates.values()}
    if same and not discrete and sum(m.dim for m in members) > MAX_DENSE:
        raise Intractable(
            group.members[0],
            latents=group.members,
            problem=f"a row reads all its cells at once, so they are one vector of {sum(m.dim for m in members):,}",
            mend=f"at most {MAX_DENSE:,}: give it fewer cells, or let a row read its own cell alone",
        )
    base = {n: program.base_of(n) for n in every}
    block = GaussianBlock(members, discrete, parts, plates, shape if same else (), not same, routed, sizes, base)
    latents = program.every_continuous
    if not same:
        index = {(s, n): in_path(program, latents[n])[v] for (s, n), v in index.items()}
    kept = {index_name(factors[s], latents[n]): v for (s, n), v in index.items() if not same or s in routed}
    return block, kept


def refuse_mixtures(members: Sequence[Continuous], plates: tuple[str, ...], discrete: Sequence[Latent]) -> None:
    """Raise where rows of one cell each have a discrete latent of their own."""
    member = members[0]
    for z in discrete:
        if not plates_of(z) <= set(plates):
            raise Intractable(
                member.name,
                latents=tuple(m.name for m in members),
                problem=f"rows that share one of its cells each have a '{z.name}' of their own: its posterior has a "
                "Gaussian for every combination of them",
                mend=f"give each row its own '{member.name}', maximise over it (maximize=[\"{member.name}\"]), or put "
                f"'{z.name}' in its plate",
            )


def refuse_unread(program: Program, members: Sequence[Continuous], factors: Sequence[Factor]) -> None:
    """Raise where a latent with a flat prior is read by nothing: all its values stay as likely as any other."""
    read = {program.base_of(m.name) for f in factors for m in read_by(f)}
    for m in members:
        if m.flat and m.name not in read:
            raise PlanError(
                m.name,
                problem="it has a flat prior, and nothing observed depends on it: its posterior is improper",
                mend=f'leave it out, or give it a law: numpyro.sample("{m.name}", dist.Normal(0.0, 1.0))',
            )


def refuse_scaled(program: Program, factors: Sequence[Factor]) -> None:
    """Raise where a latent itself is scaled: its rows with it would have to count as so many copies of them."""
    for f in factors:
        if f.is_hidden and f.site.scaled:
            raise PlanError(
                program.base_of(f.name),
                problem="handlers.scale stands around a continuous latent, which is not integrated so many times",
                mend="repeat those rows, or scale the observed sites alone",
            )


def gaussian_chain(
    program: Program, members: Sequence[Continuous], factors: Sequence[Factor], discrete: Sequence[Latent]
) -> GaussianChain | None:
    """The latents as states of one chain, and such as only its start reads; None where they are not that."""
    chains = {id(c): c for m in members if (c := program.chain_of(m.name)) is not None}
    chain = next(iter(chains.values()), None)
    if chain is None or len(chains) > 1 or discrete or not 0 < chain.lag < chain.length:
        return None
    paths = tuple(m for m in members if m.name in chain.lags)
    outside = tuple(m for m in members if m.name not in chain.lags)
    plates = paths[0].plates[1:]
    shape = tuple(s for a, s in zip(paths[0].axes, paths[0].shape, strict=True) if not a.startswith("#"))[1:]
    if any(m.plates[1:] != plates for m in paths) or any(m.plates != plates for m in outside):
        return None
    bases = {m.name for m in paths}
    steps = (chain.time, chain.bulk)
    beside = frozenset(
        f.name for f in factors if {m.name for m in read_by(f)} <= bases and not set(steps) & set(f.site.axes)
    )
    block = GaussianChain(
        chain, paths, outside, tuple(factors), plates, shape, {p.name: p.size for p in program.plates.values()}, beside
    )
    return block if all(stands_in_chain(block, f) for f in factors if f.name not in beside) else None


def path_rows(program: Program, chain: GaussianChain, values: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Of the sites beside a chain, the cell of its path that every row reads.

    Raises:
        Intractable: a row reads several of them.
    """
    out = {}
    for f in (f for f in chain.factors if f.name in chain.beside):
        index = {(f.name, m.name): cells_of_rows(program, f, m, values, True) for m in read_by(f)}
        first = next(iter(index.values()))
        if not agree(index, f):
            raise joined_at(program, f, read_by(f)[0], frozenset())
        name, found = named_index(f, first, int(np.prod(chain.cells, dtype=int)))
        out[name] = found
    return out


def stands_in_chain(block: GaussianChain, f: Factor) -> bool:
    """Whether a factor reads states of its own step and the few before it, or of the first steps, in its own row."""
    kind, names = block.kind(f), {m.name for m in read_by(f)}
    if not set(block.plates) <= set(f.site.plates) or any(f"{m.name}[-" in n for m in block.paths for n in names):
        return False
    if not kind:  # a whole path, at several steps, is none of the chain's pieces
        return not names & {m.name for m in block.paths}
    here = {m.name for m in block.paths}
    if kind == block.chain.bulk:
        here = {at_lag(n, i) for n in here for i in range(block.chain.lag + 1)}
    return names <= here


def in_path(program: Program, piece: Continuous) -> np.ndarray:
    """For each cell of a latent its flat number among those of the path that it is a piece of."""
    base = program.continuous[program.base_of(piece.name)]
    ids = np.arange(int(np.prod(base.shape, dtype=int))).reshape(base.shape)
    if piece.name == base.name:
        return ids.ravel()
    chain = next(c for c in program.chains if base.name in c.lags)
    if piece.name.startswith(f"{base.name}["):
        return ids[int(piece.name[len(base.name) + 1 : -1])].ravel()
    back = int(piece.name[len(base.name) + 1 :])
    return ids[chain.lag - back : chain.length - back].ravel()


def with_gaps(
    program: Program, factors: Sequence[Factor], values: Mapping[Any, Any]
) -> tuple[tuple[Factor, ...], tuple[MissingEntries, ...], dict[str, np.ndarray]]:
    """The factors, those marked whose vectors are seen in part; a block for each; and the patterns of their rows.

    Raises:
        PlanError: the covariance of such a site differs from row to row, or it reads a latent of another plate.
    """
    out, blocks, cells = [], [], {}
    for f in factors:
        given = partly_seen(program, f, values)
        if given is None:
            out.append(f)
            continue
        f = dataclasses.replace(f, gaps=True)
        refuse_unpatterned(f)
        out.append(f)
        plates = f.kept if f.latents else f.site.plates
        sizes = dict(zip(f.site.axes, f.site.shape, strict=True))
        member = Continuous(f.name, f.site.axes, f.site.shape, given.shape[-1:], "vectors seen in part")
        blocks.append(MissingEntries(f, member, plates, tuple(sizes[p] for p in plates)))
        given = np.broadcast_to(given, (*f.site.shape, given.shape[-1]))
        cells[f"{f.name}·patterns"], cells[f"{f.name}·pattern"] = patterns_of(given)
    return tuple(out), tuple(blocks), cells


def partly_seen(program: Program, f: Factor, values: Mapping[Any, Any]) -> np.ndarray | None:
    """The data of a multivariate normal site, where some of its vectors are seen in part."""
    key = (f.name, "given")
    if f.family is None or f.family.name != "MultivariateNormal" or key not in program.full.outputs:
        return None
    if any(k[0] not in ("data", "key") for k in program.full.needs(key)):
        return None
    given = np.asarray(program.full.evaluate([key], values)[0])
    gone = np.isnan(given)
    return given if (gone.any(-1) & ~gone.all(-1)).any() else None


def refuse_unpatterned(f: Factor) -> None:
    """Raise where missing entries of a site are not the same problem for all rows of a pattern."""
    if f.route is not None or f.completions is not None:
        raise PlanError(
            f.name,
            problem="its vectors are partly NaN, and it reads a latent of another plate, or a continuous one",
            mend="drop those rows, or set them to NaN as a whole",
        )
    graph, shapes = f.graph, []
    for arg in f._family.args[1:]:
        shapes += graph.shape((f.name, f"arg:{arg}"))[:-2]
    if any(s > 1 for s in shapes):
        raise PlanError(
            f.name,
            problem="its vectors are partly NaN, and its covariance differs from row to row",
            mend="give all rows one covariance (for each state of a latent), or drop those rows",
        )


def local_block(
    program: Program, group: Group, factors: Mapping[str, Factor], values: Mapping[Any, Any]
) -> tuple[LocalBlock, dict[str, np.ndarray]]:
    """A group whose posterior is not Gaussian, if each of its cells can be integrated apart.

    Raises:
        PlanError: cells are tied together.
    """
    members = tuple(program.continuous[n] for n in group.members)
    parts = tuple(factors[s] for s in group.sites)
    discrete = tuple({z.name: z for f in parts for z in f.latents}.values())
    index = {(f.name, m.name): cells_of_rows(program, f, m, values) for f in parts for m in read_by(f)}
    plates = members[0].plates

    def refuse(why: str) -> Intractable:
        problem = (
            f"the posterior of {', '.join(group.members)} is not Gaussian ({group.refusal} at '{group.at}'), {why}"
        )
        mend = (
            f'EM(model, maximize=["{group.members[0]}"]) to maximise over it, or leave e_step out for an approximation'
        )
        return Intractable(group.at, problem=problem, mend=mend, latents=group.members)

    if any(program.chain_of(n) for n in group.members):
        raise refuse("and a scan carries it from step to step")
    if len({m.axes for m in members}) > 1 or not all(agree(index, f) for f in parts):
        raise refuse("and its cells are tied together, since rows read several of them")
    for z in discrete:
        if not {a for a in z.axes if not a.startswith("#")} <= set(plates):
            raise refuse(f"and rows of other plates than its own have a state of '{z.name}' each")
    for f in parts:
        refuse_random_weights(program, f.site)
        inner = f.name in group.members and any(a not in members[0].axes or a.startswith("#") for a in f.site.axes)
        if inner and f.site.masked:
            raise refuse("and a mask takes out parts of its events")
        if inner and f.site.scaled and not set(f.site.plates) <= set(plates):
            refuse_scaled(program, [f])
    shape = tuple(s for a, s in zip(members[0].axes, members[0].shape, strict=True) if not a.startswith("#"))
    own = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    found = {f.name: index[f.name, read_by(f)[0].name] for f in parts}
    refuse_heavier(program, members, plates, parts, found, values)
    routed = frozenset(n for n, ids in found.items() if not at_home(ids, own, factors[n].site.plates, plates))
    sizes = {p.name: p.size for p in program.plates.values()}
    pieces, order = find_pieces(program, members, parts, values)
    block = LocalBlock(
        members, discrete, parts, plates, shape, routed, sizes, f"{group.refusal} (site '{group.at}')", pieces
    )
    return block, {**order, **{index_name(factors[n], members[0]): found[n] for n in routed}}


def refuse_heavier(
    program: Program,
    members: Sequence[Continuous],
    plates: tuple[str, ...],
    factors: Sequence[Factor],
    cells: Mapping[str, np.ndarray],
    values: Mapping[Any, Any],
) -> None:
    """Raise where a cell counts more often than a row that reads it: it would be integrated so many times."""
    sizes = {p.name: p.size for p in program.plates.values()}

    def weight(name: str, axes: Sequence[str]) -> np.ndarray:
        if (name, "scale") not in program.full.outputs:
            return np.ones([sizes[a] for a in axes])
        value = scale_of(program.full.evaluate([(name, "scale")], values)[0], program.sites[name])
        value = value.sum(a for a in value.axes if a not in axes)
        return np.broadcast_to(np.asarray(value.to(tuple(axes))), [sizes[a] for a in axes])

    if not any((m.name, "scale") in program.full.outputs for m in members):
        return
    theirs = np.max([weight(m.name, plates) for m in members], 0).ravel()
    for f in factors:
        if (weight(f.name, f.site.plates) < theirs[cells[f.name]] * (1 - 1e-6)).any():
            refuse_scaled(program, [g for g in factors if g.is_hidden])


def at_home(ids: np.ndarray, own: np.ndarray, plates: Sequence[str], of_cells: Sequence[str]) -> bool:
    """Whether every row reads the cell that stands in its own plates."""
    if not set(of_cells) <= set(plates):
        return False
    order = sorted(range(len(of_cells)), key=lambda i: plates.index(of_cells[i]))
    sizes = iter(own.transpose(order).shape)
    spread = own.transpose(order).reshape([next(sizes) if p in of_cells else 1 for p in plates])
    return bool((ids == np.broadcast_to(spread, ids.shape)).all())
