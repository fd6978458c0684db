"""Train blocks of your own that a TOML file names, on data=2 x tensor=2 x pipe=2, and compare another mesh.

Run:     python examples/own_block.py     (2 CPU cores, about a minute)
Expect:  both meshes print the same losses, 2.21 and 2.27 of held-out text.
"""

from pathlib import Path

# --8<-- [start:block]
import jax
from flax import nnx
from trellax.layers import Attention, ColumnLinear, RowLinear
from trellax.layers.dropout import dropout
from trellax.layers.norms import make_norm, normalize
from trellax.pipeline import Output


class ParallelBlock(nnx.Module):
    """Attention and a feed-forward side by side on one norm, with dropout and a small loss on their size."""

    def __init__(self, config, *, rngs, rules):
        given = {"dtype": config.dtype, "rngs": rngs, "rules": rules}
        self.norm = make_norm(config, rngs=rngs, rules=rules)
        self.attention = Attention(config, rngs=rngs, rules=rules)
        self.up = ColumnLinear(config.hidden_size, 96, dim="inner", **given)
        self.down = RowLinear(96, config.hidden_size, dim="inner", **given)

    def __call__(self, x_BTD, *, microbatch, info):
        """Return x and what the block adds: x[B@data, T, D] -> y[B@data, T, D]."""
        n_BTD = normalize(self.norm, x_BTD)
        y_BTD = self.attention(n_BTD) + self.down(jax.nn.silu(self.up(n_BTD)))
        if info.key is not None:  # None in validation
            y_BTD = dropout(y_BTD, rate=0.1, keys=info.keys())
        size = ((y_BTD.astype("float32") ** 2).mean(-1) * microbatch["weights"]).sum()
        return Output(x=x_BTD + y_BTD, loss=0.01 * size, metrics={"size": size})


# --8<-- [end:block]

CONFIG = """
# --8<-- [start:config]
[mesh]
data = 2
tensor = 2
pipe = 2
[model]
block = "own_block:ParallelBlock"
dims = ["inner=tensor"]
vocab_size = 256
num_layers = 4
hidden_size = 32
num_heads = 4
max_tokens = 32
[data]
source = "text"
paths = ["squares.txt"]
seq_len = 32
[train]
steps = 30
batch_size = 16
[pipeline]
microbatches = 2
[optimizer]
learning_rate = 1e-2
# --8<-- [end:config]
"""

if __name__ == "__main__":
    from trellax.configs import load_config
    from trellax.layers import param_counts
    from trellax.train import train

    Path("own.toml").write_text(CONFIG)
    Path("squares.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    for words in ("", "--run.name other --mesh.data 4 --mesh.tensor 1 --pipeline.schedule zb-h1"):
        config = load_config("own.toml", f"--run.fake_devices 8 {words}")
        end = train(config)
        print(f"{config.mesh}: loss {end.final_train_loss:.2f}, of held-out text {end.final_val_loss:.2f}")
    print(f"{param_counts(config.model).block:,} parameters a block")
