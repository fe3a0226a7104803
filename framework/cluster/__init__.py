"""Handing runs to SLURM: the batch script, submission, what a job does before and after training, and status."""
