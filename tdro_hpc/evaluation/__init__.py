"""Test sets, runs and judgements in, figures, tests of significance and tables out."""
