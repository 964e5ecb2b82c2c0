"""Inside a job: the place of a rank, who may begin, what follows a stop or a failure."""
