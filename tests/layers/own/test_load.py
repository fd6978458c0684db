"""A class is imported from Python's path or the current directory, never from a folder with a model in it."""

import sys
from pathlib import Path
from typing import Any

import pytest
from flax import nnx
from trellax.layers import ModelConfig, Transformer, model_rules
from trellax.layers.block import Block
from trellax.layers.context.places import Places
from trellax.layers.own.load import asked_of, load_class
from trellax.meshes import ModelError, ShardingError, TrellaxError

MODULE = """
import jax.numpy as jnp
from flax import nnx


class Good(nnx.Module):
    def __init__(self, config, *, rngs, rules):
        self.weight = nnx.Param(jnp.zeros((config.hidden_size,)), out_sharding=("embed",))

    def __call__(self, x_BTD, *, places=None, info=None):
        return x_BTD * jnp.expand_dims(self.weight[...], (0, 1))


class NoDims(Good):
    def __init__(self, config, *, rngs, rules):
        self.weight = nnx.Param(jnp.zeros((config.hidden_size, 6)))


class NewDim(Good):
    def __init__(self, config, *, rngs, rules):
        self.weight = nnx.Param(jnp.zeros((config.hidden_size, 6)), out_sharding=("embed", "inner"))


class Stateful(Good):
    def __init__(self, config, *, rngs, rules):
        self.drop = nnx.Dropout(0.1, rngs=rngs)


class NoRules(nnx.Module):
    def __init__(self, config, *, rngs):
        pass

    def __call__(self, x_BTD):
        return x_BTD


class TwoInputs(nnx.Module):
    def __init__(self, config, *, rngs, rules):
        pass

    def __call__(self, x_BTD, mask_BT):
        return x_BTD


class NoParams(nnx.Module):
    def __init__(self, config, *, rngs, rules):
        pass

    def __call__(self, x_BTD):
        return x_BTD


class Unmade(Good):
    def __init__(self, config, *, rngs, rules):
        self.weight = config.no_such_field


class Fails(Good):
    def __call__(self, x_BTD):
        return x_BTD @ self.weight[...][1:]


class Narrow(Good):
    def __call__(self, x_BTD):
        return x_BTD[..., :1]


def function(config):
    pass


class Plain:
    pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory, which is on no path; its name."""
    name = f"loaded_{tmp_path.name}".replace("-", "_").replace("[", "_").replace("]", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    return name


def config_of(**more: Any) -> ModelConfig:
    return ModelConfig(vocab_size=64, num_layers=2, hidden_size=16, num_heads=2, **more)


def test_class_is_found_in_the_current_directory_after_everything_else(module: str, tmp_path: Path) -> None:
    assert asked_of(load_class(f"{module}:Good", key="block")) == ("places", "info")
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("key", "path", "match"),
    [
        ("block", "{module}_x:Good", "no module '.*_x' on Python's path or in the current directory"),
        ("block", "{module}.inner:Good", "no module '.*inner' on Python's path"),
        ("block", "{module}:Goot", "has no Goot. Did you mean 'Good'?"),
        ("block", "{module}:function", "function is not a class"),
        ("block", "{module}:Plain", "Plain is not a flax.nnx.Module"),
        ("block", "{module}:NoRules", r"__init__ has the parameters \(self, config, \*, rngs\).*\n.*\*, rngs, rules\)"),
        ("mlp_class", "{module}:TwoInputs", r"__call__ has the parameters \(self, x_BTD, mask_BT\)"),
    ],
)
def test_class_that_cannot_be_used_is_told_in_a_sentence(module: str, key: str, path: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        load_class(path.format(module=module), key=key)


@pytest.mark.parametrize(
    ("own", "error", "match"),
    [
        ({"block": "NoDims"}, ShardingError, r"NoDims.weight is \[16, 6\] and names the dims None"),
        ({"block": "NewDim"}, ShardingError, r'dim \'inner\', which has no rule.*\n.*dims=\["inner=tensor"\]'),
        (
            {"block": "NewDim", "dims": ("innr=tensor",)},
            ShardingError,
            "'inner', which has no rule. Did you mean 'innr'",
        ),
        ({"block": "Good", "dims": ("heads=none",)}, ShardingError, "'heads' is a dim of trellax's own layers"),
        ({"block": "Stateful"}, ModelError, r"Stateful.drop.* is a Rng\w+: a layer has parameters"),
        ({"block": "NoParams"}, ModelError, r"NoParams has no parameters"),
        ({"block": "Unmade"}, ModelError, r"Unmade \(.*\.py, line \d+\): AttributeError: .*no_such_field"),
        ({"block": "Fails"}, ModelError, r"Fails \(.*\.py, line \d+\): TypeError: .*shape"),
        ({"mlp_class": "Fails"}, ModelError, r"Fails \(.*\.py, line \d+\): TypeError: .*shape"),
        ({"norm_class": "Fails"}, ModelError, r"Fails \(.*\.py, line \d+\): TypeError: .*shape"),
        ({"attention_class": "Fails"}, ModelError, r"Fails \(.*\.py, line \d+\): TypeError: .*shape"),
        ({"mlp_class": "Narrow"}, ModelError, r"Narrow of a float32\[1, 4, 16\] returns float32\[1, 4, 1\]"),
    ],
    ids=str,
)
def test_module_that_does_not_fit_is_told_in_a_sentence(
    module: str, own: dict[str, Any], error: type[TrellaxError], match: str
) -> None:
    given = {key: value if key == "dims" else f"{module}:{value}" for key, value in own.items()}

    def run() -> Any:
        import jax.numpy as jnp

        return Transformer(config_of(**given), rngs=nnx.Rngs(0))(jnp.zeros((1, 4), int))

    with pytest.raises(error, match=match):
        nnx.eval_shape(run)


def test_attention_of_x_alone_is_called_with_x_alone_and_refuses_documents(module: str) -> None:
    import jax.numpy as jnp

    config = config_of(attention_class=f"{module}:NoParams")
    block = Block(config, rngs=nnx.Rngs(0))
    x_BTD = jnp.ones((1, 4, 16))
    assert block(x_BTD).shape == x_BTD.shape
    places = Places(positions=jnp.zeros((1, 4), int), segments=jnp.zeros((1, 4), int))
    with pytest.raises(ModelError, match="NoParams is not told where documents begin"):
        block.run(x_BTD, places=places)


def test_size_that_tensor_does_not_divide_is_told_with_the_equation(module: str) -> None:
    config = config_of(block=f"{module}:NewDim", dims=("inner=tensor",))
    rules = model_rules(config, {"tensor": 4})
    with pytest.raises(ShardingError, match=r"6 / 4 = 1\.5"):
        rules.check(("embed", "inner"), shape=(16, 6), sizes={"tensor": 4}, name="weight")


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ({"block": "blocks.py"}, "'blocks.py' is not a class of a module"),
        ({"block": "a:B", "mlp_class": "a:C"}, "block='a:B' with mlp_class='a:C'"),
        ({"dims": ("inner=tensor",)}, "there are none"),
        ({"block": "a:B", "dims": ("inner=tenso",)}, "Did you mean 'tensor'?"),
        ({"mlp_class": "a:B", "lora_rank": 4}, "with lora_rank=4"),
    ],
    ids=str,
)
def test_fields_that_do_not_agree_are_refused(own: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        config_of(**own)


@pytest.mark.parametrize("inside", ["model.safetensors", "checkpoints/4/seal.json"])
@pytest.mark.parametrize("place", ["here", "package"])
def test_code_beside_a_model_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, place: str
) -> None:
    """Neither where the folder is the current directory, nor as a package without an __init__.py below it."""
    folder = tmp_path / "downloaded"
    (folder / inside).parent.mkdir(parents=True)
    (folder / inside).touch()
    (folder / "planted.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n{MODULE}")
    monkeypatch.chdir(folder if place == "here" else tmp_path)
    path = "planted:Good" if place == "here" else "downloaded.planted:Good"
    with pytest.raises(ModelError, match="a folder with a model in it, whose code is never imported"):
        load_class(path, key="block")
    assert not (tmp_path / "ran").exists()


def test_module_that_fails_to_import_is_told_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"importing broken_module failed: ModuleNotFoundError: .*no_such_package"):
        load_class("broken_module:Good", key="block")
