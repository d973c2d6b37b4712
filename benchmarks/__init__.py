"""What the library costs, beside its peers; see README.md."""

import os

# JAX hands batches of eigh to its own threads; LAPACK's threads on top of those only
# wait for one another, up to 50 times longer. Read when SciPy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
