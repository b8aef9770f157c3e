import torch, time
def t(f,n=30):
    for _ in range(5): f()
    s,e=torch.cuda.Event(True),torch.cuda.Event(True); s.record()
    for _ in range(n): f()
    e.record(); torch.cuda.synchronize(); return s.elapsed_time(e)/n
import triton, triton.language as tl
@triton.jit
def dotk(x,y,o,n,B:tl.constexpr):
    i=tl.program_id(0); acc=tl.zeros([B],tl.float32); st=tl.num_programs(0)*B
    for k in range(i*B,n,st):
        off=k+tl.arange(0,B); m=off<n
        acc+=tl.load(x+off,m,0.).to(tl.float32)*tl.load(y+off,m,0.).to(tl.float32)
    tl.store(o+i,tl.sum(acc))
for I in (4096,11008):
    x=torch.randn(8192,I,device='cuda',dtype=torch.bfloat16); y=torch.randn_like(x)
    ref=(x.double()*y.double()).sum().item()
    print(I,'sum', t(lambda: torch.sum(x*y,dtype=torch.float32)), torch.sum(x*y,dtype=torch.float32).item()-ref)
    f=lambda: torch.linalg.vecdot(x,y); print('vecdot',t(f), f().float().sum().item()-ref)
    try:
        f=lambda: torch.mm(x.view(1,-1),y.view(-1,1),out_dtype=torch.float32); print('mm',t(f), f().item()-ref)
    except Exception as ex: print('mm',repr(ex)[:100])
    try:
        f=lambda: torch.bmm(x[:,None,:],y[:,:,None],out_dtype=torch.float32).sum(); print('bmm',t(f), f().item()-ref)
    except Exception as ex: print('bmm',repr(ex)[:100])
    o=torch.empty(264,device='cuda')
    def f():
        dotk[(264,)](x,y,o,x.numel(),4096); return o.sum()
    print('triton',t(f), f().item()-ref)
    A=torch.randn(16,I,device='cuda')
    print('AAt', t(lambda: A@A.T)); import sys; sys.path.insert(0,'.')
    from decompft.adapters.map import gram
    print('gram', t(lambda: gram(A)), (gram(A)-A@A.T).abs().max().item())
