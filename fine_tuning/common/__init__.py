"""What every package uses: errors, records, settings, names, the checkout and DVC."""
