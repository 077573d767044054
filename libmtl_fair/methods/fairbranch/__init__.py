"""FairBranch and FBGrad: branches where tasks differ, fairness gradients corrected inside them (arXiv:2310.13746)."""
