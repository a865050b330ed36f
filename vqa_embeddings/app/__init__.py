"""What the commands do, step by step.

An extraction: `launch` (its table, pictures, checkpoint, device and run), `assignment` (which rows this rank is to do),
`plan_summary` (the plan, in words), `extract` (rows to records), `nan_guard` (no row comes out finite), `progress`.
Around it: `supervise` (a launch from outside), `requeue` (its Slurm job goes on). Afterwards: `merge` (the parts, and
what became of every row). `options` holds what was asked for; `demo` brings its own input.
"""
