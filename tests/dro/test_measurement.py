import torch

from tdro_hpc.dro.measurement import mean_of_ratios


def test_reference_losses_that_are_all_zero_count_as_one():
    losses, ids = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])
    assert mean_of_ratios(losses, torch.zeros(3), ids, 3).tolist() == [2.0, 5.0, 0.0]


def test_quotient_under_the_dead_zone_counts_as_one():
    losses, ids = torch.tensor([2.0, 2.0]), torch.tensor([0, 1])
    found = mean_of_ratios(losses, torch.tensor([1e-6, 1.0]), ids, 2)
    torch.testing.assert_close(found, torch.tensor([2.0, 2.0]), rtol=1e-5, atol=0)
    smaller = mean_of_ratios(losses, torch.tensor([0.25, 0.75]), ids, 2)
    torch.testing.assert_close(smaller, torch.tensor([8.0, 8 / 3]))
