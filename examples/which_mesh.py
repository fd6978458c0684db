"""Ask the planner which mesh a model wants on a machine, and why the others lose. No GPU is needed.

Run:     python examples/which_mesh.py     (a few seconds)
Expect:  five meshes of 8 H100 for a Llama 3 8B, best first, then one layout of your own with its price.
"""

from trellax.configs import load_config
from trellax.plan import Layout, TrainQuestion, price_layout, read_topology, search_train

# --8<-- [start:question]
config = load_config("llama3-8b-8gpu")
topology = read_topology("h100x8")  # or "h100x64/8", eight a node, or a TOML file of your own
question = TrainQuestion(
    model=config.model,
    topology=topology,
    batch_size=config.train.batch_size,
    num_tokens=config.data.seq_len,
)
# --8<-- [end:question]

# --8<-- [start:search]
for plan in search_train(question):
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.layout.mesh.sizes.items())
    print(f"{mesh}: {plan.time_s:.2f} s a step, MFU {plan.mfu:.0%}, {plan.memory.total / 1e9:.0f} GB. {plan.why}")
# --8<-- [end:search]

# --8<-- [start:price]
own = Layout(tensor=4, pipe=2, schedule="1f1b", microbatches=64, remat="full")
plan = price_layout(question, own)
print(f"your own: {plan.time_s:.2f} s a step, of which")
for what, seconds in plan.costs.items():
    print(f"  {seconds:5.2f} s {what}")
# --8<-- [end:price]
