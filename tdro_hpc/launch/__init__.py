"""A config in, finished stages out: the plan, the jobs, what they left on disk. The only room that knows submitit."""
