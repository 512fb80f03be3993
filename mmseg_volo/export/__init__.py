"""From a trained model to files that run without this package: ``exporting`` writes them, ``running`` runs them."""
