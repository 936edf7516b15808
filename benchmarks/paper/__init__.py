"""The GVPO paper's claims, rerun at a size of minutes on a CPU."""
