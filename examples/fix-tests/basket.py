"""Prices of a basket, in cents."""

FREE_SHIPPING_FROM = 50_00
SHIPPING = 4_90


def subtotal(prices: list[int]) -> int:
    """The sum of all prices."""
    return sum(prices)


def shipping(prices: list[int]) -> int:
    """What sending a basket costs: nothing from FREE_SHIPPING_FROM on."""
    if not prices or subtotal(prices) > FREE_SHIPPING_FROM:
        return 0
    return SHIPPING


def total(prices: list[int]) -> int:
    """What a customer pays."""
    return subtotal(prices) + shipping(prices)
