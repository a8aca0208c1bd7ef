"""One GRPO step of minigrpo beside one step of TRL's GRPOTrainer, on the same model, prompts and lengths.

    python -m benchmarks --workload tiny half --repeats 5

workloads   what is run: model, prompts, group size, and the published draw of stop lengths
models      the folders that are run: the embedded model, random weights in the shape of others
sides       the programs as child processes that take one step when told to, and say how long it took
ours, trls  what each side is: the package's own training loop, and TRL's, in several ways
proof       that both do the same work: equal gradients on a shared batch
shapes      the matrix products that a step must do
limit       what those take as bare kernels, on this machine, now
harness     one workload, measured
sweeps      how cost grows along one axis
report      medians, ratios, tables, JSON
plots       the same as a picture
"""
