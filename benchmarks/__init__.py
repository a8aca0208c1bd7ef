"""One GRPO step of minigrpo beside one step of TRL's GRPOTrainer, on the same model, prompts and lengths.

    python -m benchmarks --workload tiny half --repeats 5

workloads   what is run: model, prompts, group size, and the published draw of stop lengths
sides       the two programs as child processes that take one step when told to, and say how long it took
ours, trls  what each side is: the package's own training loop, and TRL's
proof       that both do the same work: equal gradients on a shared batch
report      medians, ratios, tables, JSON
"""
