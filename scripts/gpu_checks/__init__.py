"""The checks that ``gpu_check.py`` runs on a GPU, and the report that they write to."""
