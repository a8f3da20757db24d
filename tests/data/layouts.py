"A tiny copy of each data set's real layout: each writer makes it below `root`, and returns {split: [class names]}."
import pickle
from importlib import resources

import numpy as np
import scipy.io
from PIL import Image

rng = np.random.default_rng(0)

def image(file, seed, size=(40,30), mode='RGB'):
    "An image file of random pixels"
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file)

def text(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('\n'.join(lines) + '\n')

def dump(file, value): file.write_bytes(pickle.dumps(value, protocol=2))
def struct(rows, names): return np.array([tuple(r) for r in rows], dtype=[(n, object) for n in names])

def cifar10(root):
    "The first red pixel of each image is its class"
    folder,out = root/'cifar-10-batches-py',{'train': [], 'test': []}
    folder.mkdir()
    names = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    for k,batch in enumerate([f'data_batch_{i}' for i in range(1,6)] + ['test_batch']):
        y = [(4*k+i)%10 for i in range(4)]
        x = rng.integers(0, 256, (4,3072), dtype=np.uint8)
        x[:,0] = y
        dump(folder/batch, {'data': x, 'labels': y, 'batch_label': batch, 'filenames': ['a.png']*4})
        out['test' if batch == 'test_batch' else 'train'] += [names[i] for i in y]
    dump(folder/'batches.meta', {'label_names': names, 'num_cases_per_batch': 4})
    return out

def cifar100(root):
    folder,out = root/'cifar-100-python',{}
    folder.mkdir()
    names = [f'class{i:02}' for i in range(100)]
    for split,n in (('train',12),('test',5)):
        x,y = rng.integers(0, 256, (n,3072), dtype=np.uint8),rng.integers(0, 100, n).tolist()
        dump(folder/split, {'data': x, 'fine_labels': y, 'coarse_labels': [0]*n})
        out[split] = [names[i] for i in y]
    dump(folder/'meta', {'fine_label_names': names, 'coarse_label_names': ['all']})
    return out

def fashion_mnist(root):
    folder,out = root/'FashionMNIST'/'raw',{}
    names = 'T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot'.split(',')
    folder.mkdir(parents=True)
    for split,name,n in (('train','train',9),('test','t10k',4)):
        x,y = rng.integers(0, 256, (n,28,28), dtype=np.uint8),rng.integers(0, 10, n, dtype=np.uint8)
        def write(what, *head, data):
            (folder/f'{name}-{what}-ubyte').write_bytes(np.array(head, dtype='>i4').tobytes() + data.tobytes())
        write('images-idx3', 2051, n, 28, 28, data=x)
        write('labels-idx1', 2049, n, data=y)
        out[split] = [names[i] for i in y]
    return out

def tinyimagenet(root):
    folder,wnids,out = root/'tiny-imagenet-200',['n01443537','n01629819','n01641577'],{'train': [], 'test': []}
    for w in wnids:
        for i in range(3): image(folder/'train'/w/'images'/f'{w}_{i}.JPEG', i, (64,64), 'L' if i == 2 else 'RGB')
        out['train'] += [w]*3
        text(folder/'train'/w/f'{w}_boxes.txt', ['x'])
    for i in range(5):
        image(folder/'val'/'images'/f'val_{i}.JPEG', 50+i, (64,64))
        out['test'].append(wnids[(2*i)%3])
    text(folder/'val'/'val_annotations.txt', [f'val_{i}.JPEG\t{w}\t0\t32\t44\t62' for i,w in enumerate(out['test'])])
    text(folder/'wnids.txt', wnids)
    text(folder/'words.txt', ['n01443537\tgoldfish'])
    for i in range(2): image(folder/'test'/'images'/f'test_{i}.JPEG', i, (64,64))
    return out

def imagenet100(root):
    wnids = sorted((resources.files('clae_fastai')/'imagenet100.txt').read_text().split())
    assert len(set(wnids)) == 100
    for w in [*wnids, 'n99999999']: # another class of ImageNet's thousand
        image(root/'train'/w/f'{w}_1.JPEG', 1)
        image(root/'val'/w/'ILSVRC2012_val_1.JPEG', 2)
    return {'train': wnids, 'test': wnids}

def cars(root):
    folder,names,out = root/'stanford_cars',['AM General Hummer SUV 2000','Acura RL Sedan 2012'],{}
    (folder/'devkit').mkdir(parents=True)
    scipy.io.savemat(folder/'devkit'/'cars_meta.mat', {'class_names': np.array(names, dtype=object)})
    columns = ['bbox_x1','bbox_y1','bbox_x2','bbox_y2','class','fname']
    for split,y,notes in (('train', [1,2,2,1], 'devkit/cars_train_annos.mat'),
                          ('test', [2,2,1,1], 'cars_test_annos_withlabels.mat')):
        for i in range(4): image(folder/f'cars_{split}'/f'{i+1:05}.jpg', i)
        rows = [(1,1,9,9,c,f'{i+1:05}.jpg') for i,c in enumerate(y)]
        scipy.io.savemat(folder/notes, {'annotations': struct(rows, columns)})
        out[split] = [names[c-1] for c in y]
    return out

def aircraft(root):
    folder,names,out = root/'fgvc-aircraft-2013b'/'data',['707-320','Boeing 717','DC-10'],{}
    text(folder/'variants.txt', names)
    for k,(split,name) in enumerate((('train','trainval'),('test','test'))):
        out[split] = [names[i%3] for i in range(k, k+5)]
        for i in range(5): image(folder/'images'/f'{k}{i:05}.jpg', i)
        text(folder/f'images_variant_{name}.txt', [f'{k}{i:05} {c}' for i,c in enumerate(out[split])])
    return out

def dtd(root):
    folder,out = root/'dtd'/'dtd',{'train': [], 'test': []}
    for part in ('train','val','test'):
        lines = [f'{c}/{c}_{part}{i}.jpg' for c in ('banded','blotchy') for i in range(2)]
        for l in lines: image(folder/'images'/l, 1)
        text(folder/'labels'/f'{part}1.txt', lines)
        text(folder/'labels'/f'{part}2.txt', ['other/partition.jpg'])
        out['test' if part == 'test' else 'train'] += [l.split('/')[0] for l in lines]
    return out

def pets(root):
    folder,names,out = root/'oxford-iiit-pet',['Abyssinian','american_bulldog'],{}
    for split,name,first in (('train','trainval',0),('test','test',3)):
        ids = [(f'{c}_{i}', n) for n,c in enumerate(names) for i in range(first, first+3)]
        for i,_ in ids: image(folder/'images'/f'{i}.jpg', 1)
        text(folder/'annotations'/f'{name}.txt', [f'{i} {n+1} {n+1} 1' for i,n in ids])
        out[split] = [names[n] for _,n in ids]
    return out

def flowers(root):
    folder,labels = root/'flowers-102',np.array([77,77,1,1,102,102,77,1], dtype=np.uint8)
    name = {77: 'passion flower', 1: 'pink primrose', 102: 'blackberry lily'}
    for i in range(8): image(folder/'jpg'/f'image_{i+1:05}.jpg', i)
    scipy.io.savemat(folder/'imagelabels.mat', {'labels': labels[None]})
    train,valid,test = [1,3],[5,2],[4,6,7,8]
    scipy.io.savemat(folder/'setid.mat', {k: np.array([v]) for k,v in (('trnid',train),('valid',valid),('tstid',test))})
    return {k: [name[labels[i-1]] for i in v] for k,v in (('train',train+valid),('test',test))}

def caltech101(root):
    out = {'train': [], 'test': []}
    for c,n in (('BACKGROUND_Google',33),('accordion',32),('airplanes',35)):
        folder = root/'caltech101'/'101_ObjectCategories'/c
        for i in range(n): image(folder/f'image_{i+1:04}.jpg', i, (20,16), 'L' if i == 3 else 'RGB')
        out['train'] += [c]*30
        out['test'] += [c]*(n-30)
    return out

writers = {f.__name__: f for f in (fashion_mnist, cifar10, cifar100, tinyimagenet, imagenet100, cars,
                                   aircraft, dtd, pets, flowers, caltech101)}
