"""A data set of any size from one seed's stream, by any number of processes: each writes its shard, and they are joined.

    python -m serve.dataset write --out digits --count 1000000 --seed 7 --shards 8 --shard 3   # shard 3 of 0 to 7
    python -m serve.dataset join --out digits --format idx                                      # or npz

In a Kubernetes Indexed Job the shard is ``JOB_COMPLETION_INDEX``. The model runs here, without a server. Whole batches
aligned to the stream are run whichever shard a digit falls into, so that its bytes do not depend on how the work was split;
across different processors or providers they are the same within one grey level.

A shard is written beside and renamed when it is whole: one that was killed is not there, and one that is there is kept.
idx files are laid out as MNIST's. A conditional model's labels are the stream's own, or with ``--labels`` those in turn; an
unconditional model's digits have none, and 255 stands for that. With ``--filter`` a digit that a judge does not read as its label
gives way to the one at a later address (filter.py).
"""
