"""``simuleval --user-dir agent`` registers EchoStream's scorers; ``--score-only`` needs it, for it imports no agent."""

from echostream.evaluation.simul import register

register()
