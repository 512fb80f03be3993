"""The metafile of the configs lists every config, with what the config itself and configs/README.md say."""

import re
from pathlib import Path

import yaml
from mmengine.config import Config
from small_runs import ROOT


def test_the_metafile_of_the_configs():
    """The paper's figures are not listed as results."""
    (path,) = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    content = yaml.safe_load((ROOT / path).read_text())
    collections = {one['Name'] for one in content['Collections']}
    models = {one['Config']: one for one in content['Models']}
    shipped = sorted((ROOT / 'configs').glob('*.py'))
    assert len(shipped) > 10 and models.keys() == {str(one.relative_to(ROOT)) for one in shipped}
    table = (ROOT / 'configs/README.md').read_text()
    for name, model in models.items():
        config, meta = Config.fromfile(ROOT / name), model['Metadata']
        assert model['Name'] == Path(name).stem and model['In Collection'] in collections
        assert (ROOT / model['Code']).is_file()
        row = next(line for line in table.splitlines() if line.startswith(f'| `{Path(name).name}`'))
        gpus = int(row.split('|')[3].split()[0])
        assert meta['Batch Size'] == gpus * config.train_dataloader.batch_size
        assert meta['Iterations'] == config.train_cfg.max_iters
        assert meta['Architecture'] == [f'VOLO-{config.model.backbone.arch.upper()}', 'UPerNet']
        init = config.model.backbone.get('init_cfg')
        assert meta['Pretrained'] == (init.checkpoint if init else 'none')
        paper = re.search(r'\| ([\d.]+) \(paper\)', row)
        assert model['Paper'].get('Reported', {}).get('mIoU') == (float(paper[1]) if paper else None)
        measured = re.search(r'\| ([\d.]+) \(measured', row)
        assert [one['Metrics']['mIoU'] for one in model.get('Results', [])] == (
            [float(measured[1])] if measured else []
        )
