"""What every room uses: errors, records, settings, names, the checkout and DVC."""
