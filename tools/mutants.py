#!/usr/bin/env python3
"""Does the suite notice? Faults of one line each, and the tests that have to fail: `python tools/mutants.py [NAMES]`

The files under version control go to a temporary folder. There the tests run once as they are and have to pass; then
each fault is written in, its tests have to fail, and it is taken out again. A fault whose text is not found exactly
once is refused: the code has moved on, and so must the fault."""
import argparse
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

root = Path(__file__).resolve().parent.parent
Mutant = namedtuple('Mutant', 'module name what text instead tests')
mutants = []

def mutant(module, name, what, tests, change):
    "`change`: a text that is in the module once, and the text instead"
    mutants.append(Mutant(module, name, what, *change, tests.split()))

golden,matrix,learner = 'method/test_golden.py','method/test_method_matrix.py','train/test_learner.py'
resume,figures,trials = 'train/test_checkpoint.py','paper/test_analysis.py','paper/test_experiments.py'
people,paper,adam = 'data/test_images_of_people.py','test_paper_device.py','train/test_optimizer.py'
processes,bad = 'train/test_distributed.py','test_bad_days.py'

# method

mutant('method.attacks', 'descent', 'the attack lowers the loss',
       f'{golden}::test_attack',
       ('def delta(self, x, grad): return self.eps*self.direction(grad())',
        'def delta(self, x, grad): return -self.eps*self.direction(grad())'))
mutant('method.attacks', 'anchors', 'anchors move with the images that are attacked',
       f'{golden}::test_attack',
       ('anchor = z.detach()', 'anchor = z'))
mutant('method.attacks', 'clamp', 'pixel space leaves valid pixels',
       'method/test_attacks.py::test_size_validity_and_no_nan',
       ('return torch.clamp(x + delta/std, black, white)', 'return x + delta/std'))
mutant('method.attacks', 'generator', "random attacks draw from the views' generator",
       f'{learner}::test_same_views_at_every_eps',
       ('return f(shape, generator=self.generator, device=x.device, dtype=x.dtype)',
        'return f(shape, device=x.device, dtype=x.dtype)'))
mutant('method.dualbn', 'statistics', "batch norm's statistics move during the attack",
       f'{learner}::test_attack_leaves_no_trace',
       ("with _attribute(bns, 'track_running_stats', False): yield model",
        "with _attribute(bns, 'track_running_stats', True): yield model"))
mutant('method.models', 'clean-bn', 'adversarial images go through the clean batch norm',
       f'{golden}::test_three_steps_of_training',
       ('with adversarial_bn(self): return z_q,z_p,self.embed(x_adv)', 'return z_q,z_p,self.embed(x_adv)'))
mutant('method.losses', 'alpha', 'alpha weighs nothing',
       f'{golden}::test_three_steps_of_training',
       ('return loss + self.alpha*loss_adv', 'return loss + loss_adv'))
mutant('method.losses', 'diagonal', 'each image is its own negative',
       f'{golden}::test_loss_and_its_gradients',
       ('sim = (z @ self.everybody(z).T / self.temperature).fill_diagonal_(-torch.inf)',
        'sim = z @ self.everybody(z).T / self.temperature'))
mutant('method.losses', 'temperature', 'the plain loss has no temperature',
       f'{golden}::test_loss_and_its_gradients',
       ('sim = z_q @ self.everybody(z_p).T / self.temperature', 'sim = z_q @ self.everybody(z_p).T'))
mutant('method.losses', 'keys', "UEL's second factors are no constants",
       f'{golden}::test_loss_and_its_gradients',
       ('keys = self.everybody(z.detach() if self.detach_keys else z)', 'keys = self.everybody(z)'))
mutant('method.models', 'length', 'embeddings keep their length',
       f'{golden}::test_three_steps_of_training',
       ('return F.normalize(at_least_float32(z), dim=1) if self.normalize else z', 'return z'))
mutant('method.attacks', 'too-far', 'after its random start R+FGSM steps as far as FGSM',
       'method/test_attacks.py::test_size_validity_and_no_nan',
       ('(self.eps - self.start_size)*self.direction', 'self.eps*self.direction'))
mutant('method.attacks', 'loud-noise', 'random signs are twice as large as they may be',
       'method/test_attacks.py::test_size_validity_and_no_nan',
       ('def delta(self, x, grad): return self.eps*self.random_direction(x)',
        'def delta(self, x, grad): return 2*self.eps*self.random_direction(x)'))
mutant('method.attacks', 'one-step', 'PGD makes a single step',
       'method/test_attacks.py::test_pgd_takes_its_steps',
       ('for _ in range(self.steps):', 'for _ in range(1):'))
mutant('method.views', 'one-view', 'both views are the same one',
       f'{learner}::test_same_image_different_views',
       ('return self._normalize(self.aug(x)),self._normalize(self.aug(x))', 'return (self._normalize(self.aug(x)),)*2'))

mutant('method.views', 'range', 'values outside [0,1] are clipped',
       f'{people}::test_values_that_views_would_clip',
       ('if x.dtype == torch.uint8 or -.5 <= low <= high <= 1.5: return', 'return'))
mutant('method.views', 'batch-crop', 'a Compose crops all images of a batch alike',
       f'{people}::test_torchvision_s_transforms_draw_for_each_image',
       ("if _comes_from(aug, _for_images): aug =", "if _comes_from(aug, _for_images): return None; aug ="))
mutant('train.learner', 'behind', 'transforms behind Normalize are dropped',
       f'{people}::test_transforms_of_batches',
       ('[1:] if fs else []', '[1:] if False else []'))

# data

mutant('data.reading', 'sixteen-bits', 'images of 12 bits are scaled as if they had 16',
       f'{people}::test_bit_depth',
       ('2**max(8, int(max(o.high for _,o in deep)).bit_length()) - 1', '2**16 - 1'))
mutant('data.reading', 'sideways', 'the orientation in the EXIF data is not honoured',
       f'{people}::test_orientation',
       ('im = im.transpose(_turns[turn])', 'pass'))
mutant('data.reading', 'transparent', 'what is transparent shows the colour beneath',
       f'{people}::test_transparent_images',
       ("return Image.alpha_composite(Image.new('RGBA', im.size, background), im)", 'return im'))
mutant('data.reading', 'deep-colour', 'colours of 16 bits lose eight of them',
       f'{people}::test_colours_of_sixteen_bits',
       ('if lost := _lost_by_pillow(im):', 'if False:'))
mutant('data.reading', 'stale', 'an image that has changed counts as checked',
       'data/test_images.py::test_readable_images_are_remembered',
       ('if old and old[:3] == stamp and', 'if old and'))
mutant('core', 'came-along', 'a memory or cache that came with a data set is believed',
       'data/test_strangers.py::test_a_memory_that_came_along data/test_strangers.py::test_images_that_came_along',
       ('status.st_mtime_ns,status.st_ctime_ns', 'status.st_mtime_ns,0'))
mutant('data.reading', 'any-format', 'PostScript by another name starts Ghostscript',
       'data/test_strangers.py::test_no_program_is_started',
       (', formats=[o for o in Image.ID if o in formats])', ')'))
mutant('data.reading', 'other-names', 'an image is found by each of its names',
       'data/test_strangers.py::test_many_names_of_one_file',
       ('files.setdefault(_identity(file) or file, file)', 'files.setdefault(file, file)'))
mutant('data.images', 'label-order', 'classes are numbered from the end',
       'data/test_catalogue.py::test_catalogue',
       ('index = {c: i for i,c in enumerate(classes)}',
        'index = {c: i for i,c in enumerate(classes[::-1])}'))
mutant('data.catalogue', 'split-seed', "Caltech-101's split has no seed",
       'data/test_catalogue.py::test_caltech_split_by_seed',
       ('random.Random(seed)', 'random.Random(0)'))
mutant('data.folders', 'lonely', 'a class of one image is tested on, and not trained',
       f'{people}::test_each_class_is_held_out',
       ('if share and len(own) >= 2*least: n = min(max(least, round(share*len(own))), len(own)-least)',
        'if share: n = min(max(least, round(share*len(own))), len(own))'))
mutant('data.folders', 'case', 'split folders are known by lower case alone',
       f'{people}::test_split_folders',
       ('{2}$\', \'\', folder.lower())', '{2}$\', \'\', folder)'))
mutant('data.folders', 'stray', 'a stray image takes all labels away, unsaid',
       f'{people}::test_stray_images',
       ('if classes and stray:', 'if stray: classes = ()\n    if False:'))

mutant('core', 'blocking', 'each copy to a GPU is waited for',
       f'{paper}::test_images_live_on_the_device {paper}::test_photographs {paper}::test_ways_to_train[pixels]',
       ("non_blocking=kind not in ('cpu','mps')", 'non_blocking=False'))
mutant('data.folders', 'mixed-up', 'images that are kept beside a folder have the names of others',
       'data/test_names.py::test_folders',
       ('classes, reader, own)', 'classes, reader, own[::-1])'))
mutant('data.folders', 'cut', 'small images are cut out of their files as photographs are',
       'data/test_folder_dl.py::test_pixels_of_validation',
       ('WholeImages(folder.files, own, reader=reader)', 'FileImages(folder.files, own, reader=reader)'))
mutant('measure.features', 'half-table', 'a table that was not finished stays',
       'measure/test_embed.py::test_nothing_half',
       ('with new_file(file) as tmp, rows(tmp, names) as write:', 'with rows(file, names) as write:'))
mutant('data.images', 'away', 'images in memory are copied to the device in every step',
       f'{paper}::test_images_live_on_the_device',
       ('self.device if self.from_device else None', 'None'))
mutant('data.images', 'hoard', 'a set goes to the device whatever its size',
       f'{paper}::test_too_large_for_the_device',
       ('return n_bytes <= (', 'return True or n_bytes <= ('))
mutant('method.views', 'noise', 'noise is drawn on the CPU and copied',
       f'{paper}::test_a_batch_of_training_brings_no_images',
       ('set_rng_device_and_dtype(input.device,', "set_rng_device_and_dtype('cpu',"))

# train

mutant('train.checkpoint', 'batch-count', 'a resumed epoch repeats a batch',
       f'{resume}::test_optimisers[sgd]',
       ("(self.state['batch'] + 1)", "self.state['batch']"))
mutant('train.checkpoint', 'random-state', "PyTorch's generator begins anew at a resume",
       f'{resume}::test_optimisers[sgd]',
       ("torch.set_rng_state(own['torch'])", 'pass'))
mutant('train.checkpoint', 'attack-state', "the attack's generator begins anew at a resume",
       f'{resume}::test_optimisers[sgd]',
       ("attack=nested_attr(learn, 'clae.attack')", 'attack=None'))
mutant('method.callback', 'scaler', "the attack's loss is not scaled under float16",
       f'{matrix}::test_precision_is_what_it_says',
       ('loss = self.loss_func.pair if scaler is None else', 'loss = self.loss_func.pair if True else'))
mutant('train.precision', 'dtype', 'float16 is bfloat16',
       f'{matrix}::test_precision_is_what_it_says',
       ('dtype = torch.bfloat16 if mixed.amp_mode == AMPMode.BF16 else torch.float16', 'dtype = torch.bfloat16'))
mutant('train.optimizer', 'no-decay', 'norms and biases decay',
       f'{adam}::test_equals_fastais_adam',
       ("wd = h['wd'] if state.get('do_wd', True) else 0.", "wd = h['wd']"))
mutant('train.optimizer', 'layout', 'a kernel mixes up weights and gradients that lie otherwise in memory',
       f'{adam}::test_any_gradients_in_any_layout',
       ('return t if t.stride() == p.stride() and t.dtype == p.dtype else torch.empty_like(p).copy_(t)', 'return t'))
mutant('train.optimizer', 'debias', 'averages are taken for one step older than they are',
       f'{adam}::test_equals_fastais_adam',
       ('torch.full((len(tensors),), step-1,', 'torch.full((len(tensors),), step,'))
mutant('train.finite', 'rollback', 'a skipped step leaves its batch in the statistics',
       f'{matrix}::test_a_skipped_step_leaves_nothing',
       ('with torch.no_grad(): _copy_all(self.model.buffers(), self.kept)', 'pass'))
mutant('train.finite', 'two-waits', 'the gradients are waited for one by one',
       f'{paper}::test_skip_waits_once_more',
       ('ok = (self.loss.detach().isfinite().all() & largest.isfinite()).float()',
        'ok = largest.new_tensor(float(self.loss.isfinite().all() and all(g.isfinite().all() for g in grads)))'))
mutant('train.encoder', 'header', 'any file passes as an encoder',
       'test_fuzz.py::test_wrong_headers',
       ('if not ok: raise ValueError(', 'if False: raise ValueError('))
mutant('train.encoder', 'giant', 'a few bytes that name a giant architecture have it built',
       'train/test_damaged_encoders.py::test_many_channels',
       ('with _NoLarger(room): ', ''))
mutant('train.checkpoint', 'undeclared', 'a checkpoint sets of callbacks what it likes',
       'train/test_damaged_encoders.py::test_callbacks_get_what_they_declare',
       ("if unknown := ', '.join(memory.keys() - {*_remembers(cb)}):", "if unknown := '':"))
mutant('core', 'rank-offset', "a process takes the first one's rows for its own",
       f'{processes}::test_equals_one_process_on_the_whole_batch[2]',
       ('return n*this_rank()', 'return 0'))
mutant('data.catalogue', 'download-lock', 'a process reads the half of an archive that another one downloads',
       'data/test_catalogue.py::test_one_process_downloads',
       ('with one_at_a_time(path, entry.name):', 'with contextlib.nullcontext():'))
mutant('cli', 'own-gpu', 'every process begins on the first GPU',
       f'{processes}::test_each_process_takes_its_gpu_first',
       ('if rank < torch.cuda.device_count(): torch.cuda.set_device(rank)', 'pass'))
mutant('train.distributed', 'from-all', 'processes wait in a collective for one that loads',
       f'{processes}::test_a_first_process_that_takes_long',
       ('while not store.check(keys): time.sleep(.05)', 'dist.barrier()'))
mutant('train.checkpoint', 'agreement', 'a process that has got a signal stops alone',
       f'{processes}::test_stopped_and_killed',
       ('self.stopping = self.agreement(self.signal) if self.agreement else self.signal',
        'self.stopping = self.signal'))
mutant('train.checkpoint', 'own-states', 'all processes go on with the random states of the first one',
       f'{processes}::test_resuming_on_as_many_processes[RFGSM]',
       ('own = states[this_rank()] if len(states) == world_size() else {}', 'own = states[0]'))
mutant('train.checkpoint', 'own-starts', 'on another number of processes all draw the same random starts',
       f'{processes}::test_resuming_what_one_process_saved',
       ("state['attack']['generator'] = None", 'pass'))
mutant('train.precision', 'deterministic', 'what is forbidden in a deterministic fit stays forbidden after it',
       f'{learner}::test_deterministic',
       ('torch.set_deterministic_debug_mode(mode)', 'pass'))

# measure

mutant('measure.monitors', 'shrunk', 'embeddings that shrink to a point are no collapse',
       'measure/test_verdict.py::test_only_drawn_together',
       ('if spread_end < .01 or (spread_end < .2 and spread_end < spread_start/2):', 'if spread_end < .001:'))
mutant('measure.monitors', 'first-ones', 'the effective rank is that of the first held-out images',
       'measure/test_verdict.py::test_numbers',
       ('idxs = evenly_spread(n, min(1024, max(128, n_train//20)))',
        'idxs = list(range(min(n, 1024, max(128, n_train//20))))'))
mutant('measure.monitors', 'asked', 'a loss is asked about equal embeddings itself, and remembers them',
       'measure/test_verdict.py::test_a_loss_that_cannot_say',
       ("loss = deepcopy(getattr(self.loss_func, 'pair', self.loss_func))",
        "loss = getattr(self.loss_func, 'pair', self.loss_func)"))
mutant('measure.monitors', 'forgotten', 'a resumed training does not know how it began',
       'measure/test_verdict.py::test_resumed',
       ("('batches','curve','last','shape')", "('batches','last','shape')"))
mutant('measure.monitors', 'too-soon', 'a training that still falls is called finished',
       'measure/test_verdict.py::test_states',
       ('if late > .2*fall:', 'if late > 2*fall:'))

mutant('measure.features', 'votes', 'all neighbours weigh the same',
       f'{golden}::test_knn',
       ('votes = ((sim - sim[:,:1])/temperature).exp_()', 'votes = torch.ones_like(sim)'))
mutant('measure.features', 'one-by-one', 'features go to the CPU batch by batch',
       f'{paper}::test_evaluation',
       ('for o in self.batches) >= 2**26', 'for o in self.batches) >= 0'))
mutant('measure.features', 'twice', 'images that the DataLoaders have normalised are normalised again',
       f'{learner}::test_life_of_a_learner',
       ('pixels,own_stats = partial(undo_normalize, dl=dl, views=views)', 'pixels,own_stats = noop'))
mutant('measure.probe', 'centring', "the probe's bias is that of centred features",
       'measure/test_probe.py::test_lbfgs_reaches_scikit_learns_loss',
       ('w[:,-1] - w[:,:-1]@mean', 'w[:,-1]'))
mutant('measure.probe', 'chosen', 'the weakest penalty instead of the best',
       'measure/test_probe.py::test_the_penalty_is_chosen_without_the_test_set',
       ('if best is None or curve[-1] > max(curve[:-1]): best = l2,w', 'best = l2,w'))

# paper

mutant('paper.experiments', 'trial-name', "a trial's name depends on the order of its options",
       f'{trials}::test_a_name_is_that_of_the_settings_and_of_nothing_else',
       ('sort_keys=True', 'sort_keys=False'))
mutant('paper.analysis', 'bn-of-noise', 'Figure 4 estimates the adversarial statistics on clean views',
       f'{figures}::test_bn_statistics_are_those_of_the_layers_inputs',
       ('with adversarial_bn(net): net(clae.adversarial_views(x_q))', 'with adversarial_bn(net): net(x_q)'))

# runs

mutant('runs', 'eval-seed', "a folder's held-out fifth is another one in clae_eval",
       'test_cli.py::test_eval_is_on_the_data_of_the_run',
       ("seed = ['seed'] if settings['data'] in ('folder','caltech101') else []", 'seed = []'))

# bad days

mutant('data.images', 'fingerprint', "other pixels are the same images",
       f'{bad}::test_other_images_are_refused',
       ("_add('contents', memoryview(o.images.cpu()", "_add('contents', memoryview(0*o.images.cpu()"))
mutant('runs', 'other-images', 'a run goes on with whatever images there are',
       f'{bad}::test_a_trial_that_was_begun_on_other_images {bad}::test_moved_images',
       ("if before and (differ := other_images(before, images, self.moved)):", 'if False:'))
mutant('train.checkpoint', 'twins', 'a checkpoint of another run of the same settings is taken',
       f'{bad}::test_checkpoint_of_a_twin',
       ("return f if load_checkpoint(f)['run_id'] != state['run_id'] else None", 'return None'))
mutant('runs', 'given-settings', 'a checkpoint does not know its seed',
       f'{bad}::test_checkpoint_of_another_run',
       ("if k not in ('name','path','workers','every_batches','log')", 'if not k'))
mutant('runs', 'resolved', 'defaults are left open',
       f'{bad}::test_another_version_has_other_defaults',
       ('dict(options=self.settings, images=images', "dict(options={**self.settings, 'lr': None}, images=images"))
mutant('runs', 'relative-path', 'a relative path is another folder elsewhere',
       f'{bad}::test_what_is_the_same_goes_on',
       ("given['path'] = os.path.abspath(os.path.expanduser(given['path']))", 'pass'))
mutant('paper.experiments', 'two-folders', 'results of other images of the same name are printed',
       f'{bad}::test_tables_of_two_folders_of_one_name',
       ('if images: _check_images(', 'if False: _check_images('))
mutant('runs', 'side-output', 'a history that cannot be written ends the run',
       f'{bad}::test_side_output_costs_no_run',
       ('        except Exception as e: # also of Matplotlib',
        '        except ZeroDivisionError as e: # also of Matplotlib'))
mutant('core', 'half-files', 'half files of killed processes stay',
       f'{bad}::test_half_files_of_the_dead',
       ('not _is_running(int(pid)): tmp.unlink', 'False: tmp.unlink'))
mutant('runs', 'link-names', "a link's name is free",
       f'{bad}::test_names',
       ('return not folder.is_symlink() and folder.is_dir() and all(', 'return not folder.is_dir() or all('))
mutant('train.distributed', 'leftovers', 'RANK alone makes a second process',
       f'{bad}::test_leftovers_in_python',
       ("if found['WORLD_SIZE'] in ('','0','1'): return 0,1",
        "if found['WORLD_SIZE'] in ('','0','1'): return int(found['RANK'] or 0),1"))
mutant('core', 'closed-pipe', 'a reader that has gone ends the run',
       f'{bad}::test_nobody_reads',
       ('with suppress(OSError, ValueError): # the latter if it is closed', 'with suppress(ZeroDivisionError): #'))

def module(name): return f'clae_fastai/{name.replace(".", "/")}.py'

def place(m):
    "The file that holds the text of the mutant `m`"
    file = root/module(m.module)
    times = file.read_text().count(m.text)
    if times == 1: return file
    raise LookupError(f'{m.name}: its text is there {times} times, and has to be there once:\n{m.text}')

def copy_tree(to):
    for f in subprocess.run(['git','ls-files','-z'], cwd=root,
                            capture_output=True, text=True, check=True).stdout.split('\0'):
        if f and (root/f).is_file():
            (to/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root/f, to/f)

def run_tests(tree, tests, log, options):
    "In a process that was forked after the libraries were imported, which saves most of the time"
    with open(log, 'w') as f:
        for stream in (1, 2): os.dup2(f.fileno(), stream)
    os.chdir(tree)
    os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE='1')
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(tree))
    import pytest
    quick = ['-n0', '-q', '-m', '', '-p', 'no:cacheprovider', *options]
    os._exit(pytest.main(quick + [f'tests/{o}' for o in tests]))

def outcome(tree, tests, log, timeout, *options):
    "pytest's exit code (1: a test failed), and the seconds it took"
    p,start = (multiprocessing.get_context('fork').Process(target=run_tests, args=(tree, tests, log, options)),
               time.time())
    p.start()
    p.join(timeout)
    if p.is_alive():
        p.kill()
        p.join()
    return p.exitcode,time.time() - start

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', metavar='NAME',
                   help='mutants, all by default: ' + ', '.join(m.name for m in mutants))
    p.add_argument('--check', action='store_true', help='only see that each text is there once')
    p.add_argument('--timeout', type=float, default=900, help='seconds for the tests of one mutant')
    a = p.parse_args()
    if unknown := {*a.names} - {m.name for m in mutants}: p.error(f'There is no mutant {", ".join(sorted(unknown))}.')
    chosen = [m for m in mutants if not a.names or m.name in a.names]
    places,moved = {},[]
    for m in chosen:
        try: places[m.name] = place(m)
        except LookupError as e: moved.append(str(e))
    if moved: raise SystemExit('\n'.join(moved))
    if a.check: return print(f'{len(chosen)} mutants are there')
    for name in ('accelerate fastai.vision.all hypothesis kornia lightly.loss pytorch_metric_learning '
                 'sklearn.model_selection').split():
        importlib.import_module(name)
    survived = []
    with tempfile.TemporaryDirectory() as tmp:
        tree,log = Path(tmp)/'tree',Path(tmp)/'log'
        copy_tree(tree)
        def fail(what): raise SystemExit(f'{what}\n{log.read_text()[-3000:]}')
        code,seconds = outcome(tree, sorted({t for m in chosen for t in m.tests}), log, a.timeout)
        if code: fail(f'The tests do not pass as the code is (exit code {code}).')
        print(f'All pass as the code is ({seconds:.0f} s).\n\n'
              f'{"mutant":14} {"module":18} {"":9} {"s":>4}  what is wrong', flush=True)
        for m in chosen:
            file = places[m.name]
            there = tree/file.relative_to(root)
            whole = there.read_text()
            there.write_text(whole.replace(m.text, m.instead))
            code,seconds = outcome(tree, m.tests, log, a.timeout, '-x')
            there.write_text(whole)
            if code not in (0,1): fail(f'{m.name}: the tests did not run (exit code {code}).')
            if not code: survived.append(m.name)
            fate = 'killed' if code else 'SURVIVED'
            print(f'{m.name:14} {m.module:18} {fate:9} {seconds:4.0f}  {m.what}', flush=True)
    if survived: raise SystemExit(f'\n{len(survived)} of {len(chosen)} survived: {", ".join(survived)}')
    print(f'\nAll {len(chosen)} are killed.')

if __name__ == '__main__': main()
