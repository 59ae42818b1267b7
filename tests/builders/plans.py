"""Plans and calibration windows for tests that drive the pipeline without the command line."""

import hashlib

from builders.tiny_models import token_ids

from qtool.calibration.tokens import DatasetSource, Windows
from qtool.checkpoint.locate import locate
from qtool.pipeline.plan import make_plan
from qtool.recipe.schema import Export, Model, Quantize, Recipe, Rule, resolved


def random_windows(count, length, seed=0):
    """Calibration windows of random tokens."""
    ids = token_ids(count, length, seed)
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    return Windows(ids, (DatasetSource("random", digest, count),), digest)


def plan_of(
    directory, *, formats=("compressed-tensors",), rules=(), max_shard_size="5GB", **quantize
):
    """Plan the quantization of a model directory; group size 32 unless said otherwise."""
    recipe = Recipe(
        version=1,
        model=Model(id=str(directory)),
        quantize=Quantize(**{"group_size": 32, **quantize}),
        rules=tuple(Rule(**rule) for rule in rules),
        export=tuple(Export(format=name) for name in formats),
        max_shard_size=max_shard_size,
    )
    return make_plan(locate(str(directory)), resolved(recipe))
