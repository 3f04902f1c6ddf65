"""One call of the probe: features of every block, rows of each method, and the report."""

from argparse import Namespace
from functools import partial
from pathlib import Path

import jax

from simmim_jax.data import CenterCrop
from simmim_jax.evals.features import jit_on_mesh
from simmim_jax.files import utf8_name
from simmim_jax.objectives.features import check_readable, make_all_features
from simmim_jax.runs import checkpoint
from simmim_jax.runs.finished import Run, load_run
from simmim_jax.runtime import compilation, sharding
from simmim_jax.tools.images import describe_crop, make_crop, make_pass, round_up
from simmim_jax.tools.probe import plot
from simmim_jax.tools.probe.feature_cache import FeatureCache, Pass, cache_key, open_cache
from simmim_jax.tools.probe.methods import probe_blocks
from simmim_jax.tools.probe.results import Results, block_summary, edges, read_results, table
from simmim_jax.tools.probe.sets import make_sets, open_sources


def probe(options: Namespace) -> None:
    """Probe a run, print and write the results. options: as `__main__.parse` returns them."""
    compilation.enable_cache()
    out = Path(options.out)
    earlier = read_results(out)
    run = load_run(options.run, options.image_size)
    depth = run.encoder.depth
    blocks = list(options.blocks or (*range(1, depth + 1), 0))
    for block in blocks:
        check_readable(run.encoder, block, "patches", "--blocks")
    sources = open_sources(run, options)
    pools = choose_pools(run, options.pool)
    crop = make_crop(run, options.crop_fraction, options.interpolation)
    print(f"{options.run} at step {run.step}: {describe_crop(crop)}", flush=True)
    cache = extract(run, sources, crop, pools, blocks, options)
    sets = make_sets(cache, sources, options)
    paper = round(depth * 2 / 3)  # block 8 of 12 in the paper's linear evaluation (microsoft/SimMIM#14)
    header = {
        "run": utf8_name(str(run.folder)),
        "step": run.step,
        "image_size": list(run.image_size),
        "crop_fraction": crop.crop_fraction,
        "interpolation": crop.interpolation,
        "depth": depth,
        "classes": sets.num_classes,
        **{split: utf8_name(source.describe()) for split, source in sources.items()},
        "validation_images": len(sets.validation),
        # the same for every pooling
        "features": cache_key(cache.meta["identity"] | {"pool": "", "dtype": cache.meta["dtype"]}),
        "options": {name: utf8_name(x) if isinstance(x, str) else x for name, x in vars(options).items()},
    }
    results = Results(out, header, earlier, options)
    for pool in pools:
        missing = results.missing(pool, blocks, options.only)
        for rows in probe_blocks(cache, sets, pool, missing, options):
            rows = [{"pool": pool, "paper": row["block"] == paper and pool == "patches"} | row for row in rows]
            results.add(rows)
            results.write()
            if rows:
                print(block_summary(rows), flush=True)
    results.write()
    plot.write_chart(out / "blocks.png", results.rows, paper)
    for line in (*table(results.rows, paper, depth), *edges(results.rows)):
        print(line)
    print(f"\nwritten: {out}/results.csv, results.json, blocks.png")


def choose_pools(run: Run, pool: str) -> tuple[str, ...]:
    """Return the poolings to probe. "all" means all that the encoder has."""
    if pool == "all":
        return ("patches", "class_token", "both") if run.encoder.class_token else ("patches",)
    check_readable(run.encoder, 0, pool, "--pool")
    return (pool,)


def extract(
    run: Run, sources: dict, crop: CenterCrop, pools: tuple[str, ...], blocks: list[int], options: Namespace
) -> FeatureCache:
    """Return the features of the blocks. Compute those that are not on disk."""
    pool = pools[0] if len(pools) == 1 else "both"  # the other poolings are its halves
    mesh = sharding.make_mesh()
    batch_size = round_up(options.batch_size, mesh)
    passes = {}
    for split, source in sources.items():
        epoch = make_pass(source, crop, mesh, batch_size=batch_size, limit=options.limit, threads=options.threads)
        passes[split] = Pass(
            min(options.limit or len(source), len(source)),
            batch_size,
            lambda start, epoch=epoch: iter(epoch.dataset[start:].to_iter_dataset(epoch.options)),
        )
    params = run.params["encoder"]
    identity = {
        "checksums": checkpoint.checksums(params),
        "step": run.step,
        "encoder": run.config["encoder"],
        "image_size": list(run.image_size),
        **run.pixels.as_record(),
        "pool": pool,
        "crop_fraction": crop.crop_fraction,
        "interpolation": crop.interpolation,
        "limit": options.limit,
        **{split: source.fingerprint() for split, source in sources.items()},
    }
    all_features = make_all_features(run.encoder, **run.normalization, pool=pool)

    def features(params, batch) -> dict:
        by_block = all_features(params, batch["image"])
        return {f"block_{block}": by_block[block] for block in blocks}

    forward = partial(jit_on_mesh(features, mesh), jax.device_put(params, sharding.replicated(mesh)))
    return open_cache(
        Path(options.out) / "features",
        identity,
        passes,
        forward,
        blocks,
        options.dtype,
        log=partial(print, flush=True),
        max_bad_fraction=options.max_bad_fraction,
    )
