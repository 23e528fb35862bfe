"""One file per phase, each with run(run) of a Run; no phase imports another, only the run folder links them."""
