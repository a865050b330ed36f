"""What the commands do, step by step; the other rooms know nothing of each other's part in it.

`options` holds what was asked for, `demo` the example's own input. An extraction reads its input and shares the rows
out (`launch`), prints the plan (`plan_summary`), answers the rows (`extract`), stops where no value is finite
(`nan_guard`) and shows how far it is (`progress`). `supervise` watches a launch from outside and `requeue` puts its
Slurm job back into the queue. `merge` writes the parts and accounts for every row.
"""
