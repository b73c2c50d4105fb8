"""``gradwatch run``: the parent of a training command.

It starts the command and the agent, forwards signals, reaps what is orphaned
where it is PID 1, learns how the command ended, writes that where the agent
finds it (`gradwatch.journal.exits`), waits bounded for the agent's drain, and
ends as the command did. It imports no torch and starts no thread.
"""
