"""The bridge between MLflow, Alertmanager and Grafana: one small process for all runs.

It knows no journals. :mod:`poll` reads MLflow's history in bounded pieces into
:mod:`records` and :mod:`versions`, which :mod:`exposition` shows as metrics.
:mod:`desk` takes Alertmanager's webhooks (:mod:`alerts`) and writes them to
MLflow (:mod:`tagging`); :mod:`reconcile` makes up for what was missed;
:mod:`ghosts` counts, and where asked for closes, runs that died unseen.
:mod:`service` runs all of it, :mod:`web` answers HTTP. Everything that is kept
in memory is read from MLflow again after a restart.
"""
