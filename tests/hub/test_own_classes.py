"""A model of Hugging Face never names a class to import, and one with classes of the user's is never written as one."""

from typing import Any

import pytest
from trellax.hub.config import hub_model
from trellax.hub.config_write import hub_values
from trellax.layers import ModelConfig
from trellax.layers.own.check_config import OWN_CLASSES
from trellax.meshes import WeightsError

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "intermediate_size": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 64} | SIZES


def test_code_that_a_config_names_is_left_alone() -> None:
    named = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}} | dict.fromkeys(OWN_CLASSES, "planted:Model")
    plain = hub_model(LLAMA).config
    assert hub_model(LLAMA | named).config == plain
    assert [getattr(plain, name) for name in OWN_CLASSES] == [""] * len(OWN_CLASSES)


@pytest.mark.parametrize("name", OWN_CLASSES)
def test_model_with_a_class_of_the_users_is_not_exported(name: str) -> None:
    sizes = {"vocab_size": 64, "num_layers": 2, "hidden_size": 32, "num_heads": 4}
    own: dict[str, Any] = {name: "my_blocks:Mine"}
    config = ModelConfig(**sizes, **own)
    with pytest.raises(WeightsError, match=f"model.{name}='my_blocks:Mine', a class of your own"):
        hub_values(config)
