"""A target without one of the documented decisions, or with a value that is none: it would behave like no kernel."""

from dataclasses import replace

from kvmfault import Policy
from kvmfault.contract.policy import Policy as Full
from kvmfault.contract.values import RetryTest, Topup


def incomplete() -> Policy:
    return Full(topup=Topup.ALWAYS)  # error: Missing named argument


def wrong(policy: Policy) -> Policy:
    replace(policy, retry_test="gfn")  # error: incompatible type "str"; expected "RetryTest"
    replace(policy, topup=RetryTest.GFN)  # error: incompatible type "RetryTest"; expected "Topup"
    return replace(policy, retries=3)  # error: Unexpected keyword argument "retries"
