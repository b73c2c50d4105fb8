"""One run as one page: what happened to it, said first in words, then shown.

record   reads the journals of a run into arrays
verdict  says in sentences how the run did
figures  draws what is behind the sentences, by drawing: the run's curves here, those of its tensors in layers
page     puts both into one HTML file that needs nothing beside it
"""
