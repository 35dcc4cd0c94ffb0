"""``python -m inductor_vision.advisor``: what to change in a model so that its convolutions run faster here.

* ``target``: the user's model and inputs;
* ``capture``: which convolutions it computes, on what, and how long they take;
* ``choices``, ``replace``: what may be chosen for one of them;
* ``variants``: what may be done to the whole model;
* ``measure``, ``statistic``: interleaved times, and what is beyond noise;
* ``recommend``: decisions, from measurements alone;
* ``advise``: all of it in turn;
* ``summary``, ``picture``: text, JSON and plot.
"""
