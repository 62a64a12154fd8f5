"""What customers are promised."""

# ruff: noqa: PT009 (the image has unittest, no pytest)
import unittest

import basket


class Shipping(unittest.TestCase):
    def test_an_empty_basket_costs_nothing(self) -> None:
        self.assertEqual(basket.total([]), 0)

    def test_a_small_basket_pays_for_shipping(self) -> None:
        self.assertEqual(basket.total([19_99]), 19_99 + 4_90)

    def test_a_large_basket_ships_free(self) -> None:
        self.assertEqual(basket.total([45_00, 12_50]), 57_50)

    def test_shipping_is_free_from_fifty_on(self) -> None:
        self.assertEqual(basket.total([20_00, 30_00]), 50_00)


if __name__ == "__main__":
    unittest.main()
