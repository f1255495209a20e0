import torch
def sorted_pca_rows(Z, width, weights):
    Zc=(Z-Z.mean(0)).double(); v=torch.linalg.eigh(Zc.T@Zc)[1][:,-1]; o=torch.argsort(Zc@v)
    return o[torch.linspace(0,len(Z)-1,width).round().long()]
